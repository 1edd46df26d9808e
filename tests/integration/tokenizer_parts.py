"""What the tokenizer's integration tests share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil

from headrace.rpc import options
from headrace.rpc.calls import CallClient, ClientCodec
from headrace.v1 import tokenizer_pb2 as pb
from headrace.v1 import tokenizer_pb2_grpc, types_pb2

MODEL = "smollm2-135m"


async def until(condition: Callable[[], bool], what: str, limit_s: float = 20) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        await asyncio.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def libraries_of(pid: int) -> str:
    """The files that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


class Codec(
    ClientCodec[pb.TokenizeRequest, pb.TokenizeResponse, pb.TokenizeCall, pb.TokenizeResult]
):
    """The client's end of the tokenizer's hop."""

    def open(self) -> pb.TokenizeRequest | None:
        return None

    def has_more(self) -> bool:
        return False

    def request(
        self, calls: list[pb.TokenizeCall], chunks: list[types_pb2.Chunk], cancels: list[int]
    ) -> pb.TokenizeRequest:
        return pb.TokenizeRequest(calls=calls, chunks=chunks, cancels=cancels)

    def results(self, response: pb.TokenizeResponse) -> Any:
        return response.results, response.chunks

    def parse_result(self, data: bytes) -> pb.TokenizeResult:
        return pb.TokenizeResult.FromString(data)


class Client:
    """A gateway's view of the service: the stream, and the unary twins as `stub`."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options.CHANNEL)
        self.stub: Any = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)
        self.calls: CallClient[Any, Any, Any, Any] = CallClient("it", self.stub.Tokenize, Codec())

    async def ask(self, timeout_s: float = 30, **fields: Any) -> pb.TokenizeResult:
        call = pb.TokenizeCall(id=self.calls.next_id(), **fields)
        result: pb.TokenizeResult = await self.calls.call(call, timeout_s=timeout_s)
        return result

    async def encode(self, text: str, **fields: Any) -> pb.EncodeResponse:
        request = pb.EncodeRequest(model=MODEL, text=text, **fields)
        return (await self.ask(encode=request)).encode


@asynccontextmanager
async def client_of(port: int) -> AsyncIterator[Client]:
    client = Client(port)
    client.calls.start()
    try:
        yield client
    finally:
        await client.calls.close()
        await client.channel.close()
