"""Streaming clients in a process of their own, and the other end's handle on it.

Run as a program it connects all clients, streams one request on each to warm up,
says so in a line, and then runs as many rounds as every line of its input says,
answering each with a line of JSON. A round is one request per client, all at once.
Every stream must bring the tokens that were asked for, or the program fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import uvloop

from headrace.v1 import inference_pb2, inference_pb2_grpc, types_pb2

if TYPE_CHECKING:
    from types import TracebackType

_WORDS = ["water", "wheel", "stone", "river", "mill", "channel", "turbine", "gate", "grain"]
_WORDS += ["flow", "current", "power", "measure", "token", "stream", "worker", "router", "prompt"]
_WORDS += ["answer", "cache", "block", "prefix", "number", "seven"]
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Result:
    """What some rounds brought. `num_events` counts what a client had to parse."""

    num_requests: int
    num_tokens: int
    num_events: int
    wall_s: float


@dataclass(frozen=True)
class Shape:
    """What every request is like."""

    model: str
    prompt_len: int
    num_tokens: int


class Load:
    """The handle: start it, `run` rounds, leave the context."""

    def __init__(self, kind: str, target: str, shape: Shape, *, num_clients: int) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, str(Path(__file__).resolve()), kind, target),
                *("--clients", str(num_clients), "--shape", json.dumps(asdict(shape))),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Load:
        self._line()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(10)

    def run(self, num_rounds: int) -> Result:
        """Stream `num_rounds` requests on every client. Raises RuntimeError if one falls short."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{num_rounds}\n")
        self.process.stdin.flush()
        return Result(**json.loads(self._line()))

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the load failed: see above")
        return line


class HttpClient(asyncio.Protocol):
    """One connection to the OpenAI-compatible API, written to cost the machine little."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._data = bytearray()
        self._done: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        whole = self._data
        failed = whole.startswith(b"HTTP/1.1 ") and not whole.startswith(b"HTTP/1.1 200")
        if failed or whole.endswith(b"\r\n0\r\n\r\n"):
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(bytes(self._data))

    async def stream(self, prompt: str) -> tuple[int, int]:
        """One request: tokens by the usage, and events with text."""
        body = json.dumps(
            {
                "model": self._shape.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": self._shape.num_tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._data.clear()
        self._done = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        self._transport.write(head.encode() + body)
        answer = await asyncio.wait_for(self._done, _TIMEOUT_S)
        if b"data: [DONE]" not in answer:
            raise RuntimeError(f"a stream failed: {answer[-600:]!r}")
        start = answer.rindex(b'"usage":{') + len(b'"usage":')
        usage, _ = json.JSONDecoder().raw_decode(answer[start:].decode())
        return usage["completion_tokens"], answer.count(b'"delta":{"content":')


class GrpcClient:
    """One channel to the gRPC API, with a connection of its own."""

    def __init__(self, target: str, shape: Shape) -> None:
        self._shape = shape
        self._channel = grpc.aio.insecure_channel(
            target, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def stream(self, prompt: str) -> tuple[int, int]:
        """One request: tokens by the usage, and responses."""
        request = inference_pb2.GenerateRequest(
            model=self._shape.model,
            chat=inference_pb2.Chat(messages=[inference_pb2.Message(role="user", content=prompt)]),
            sampling=types_pb2.SamplingParams(max_tokens=self._shape.num_tokens, ignore_eos=True),
        )
        num_events = num_ids = num_tokens = 0
        async for response in self._stub.Generate(request, timeout=_TIMEOUT_S):
            num_events += 1
            num_ids += len(response.token_ids)
            num_tokens = response.usage.completion_tokens
        if num_ids != num_tokens:
            raise RuntimeError(f"{num_ids} token ids came, the usage says {num_tokens}")
        return num_tokens, num_events


async def _main(kind: str, target: str, num_clients: int, shape: Shape) -> None:
    loop = asyncio.get_running_loop()
    clients: list[HttpClient | GrpcClient] = []
    for _ in range(num_clients):
        if kind == "http":
            host, _, port = target.rpartition(":")
            _, client = await loop.create_connection(lambda: HttpClient(shape), host, int(port))
            clients.append(client)
        else:
            clients.append(GrpcClient(target, shape))
    source = random.Random(f"{kind} {target}")
    await _run(clients, 1, shape, source)
    print("warm", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        result = await _run(clients, int(line), shape, source)
        print(json.dumps(asdict(result)), flush=True)


async def _run(
    clients: list[HttpClient | GrpcClient], num_rounds: int, shape: Shape, source: random.Random
) -> Result:
    prompts = [[make_prompt(source, shape.prompt_len) for _ in range(num_rounds)] for _ in clients]

    async def stream_all(client: HttpClient | GrpcClient, mine: list[str]) -> int:
        num_events = 0
        for prompt in mine:
            num_tokens, events = await client.stream(prompt)
            if num_tokens != shape.num_tokens:
                raise RuntimeError(f"a stream brought {num_tokens} tokens, not {shape.num_tokens}")
            num_events += events
        return num_events

    start = time.perf_counter()
    events = await asyncio.gather(
        *(stream_all(client, mine) for client, mine in zip(clients, prompts, strict=True))
    )
    num_requests = num_rounds * len(clients)
    return Result(
        num_requests,
        num_requests * shape.num_tokens,
        sum(events),
        time.perf_counter() - start,
    )


def make_prompt(source: random.Random, length: int) -> str:
    """Words at random, of so many characters together."""
    words: list[str] = []
    made = 0
    while made < length:
        words.append(source.choice(_WORDS))
        made += len(words[-1]) + 1
    return " ".join(words)[:length]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["http", "grpc"])
    parser.add_argument("target")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--shape", type=lambda text: Shape(**json.loads(text)), required=True)
    given = parser.parse_args()
    uvloop.run(_main(given.kind, given.target, given.clients, given.shape))
