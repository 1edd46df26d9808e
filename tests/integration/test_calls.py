"""Many calls on one stream, over real gRPC: order, length, cancels, breaks, limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from headrace.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from headrace.rpc import options
from headrace.rpc.calls import CallClient, CallServer, ServerCodec
from headrace.rpc.server import Server
from headrace.v1 import tokenizer_pb2 as pb
from headrace.v1 import tokenizer_pb2_grpc, types_pb2
from tests.integration.tokenizer_parts import Codec

Dispatch = Callable[[pb.TokenizeCall], Any]


class EchoServerCodec(
    ServerCodec[pb.TokenizeRequest, pb.TokenizeResponse, pb.TokenizeCall, pb.TokenizeResult]
):
    def calls(self, request: pb.TokenizeRequest) -> Any:
        return request.calls, request.chunks, request.cancels

    def parse_call(self, data: bytes) -> pb.TokenizeCall:
        return pb.TokenizeCall.FromString(data)

    def has_more(self) -> bool:
        return False

    def response(
        self, results: list[pb.TokenizeResult], chunks: list[types_pb2.Chunk]
    ) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(results=results, chunks=chunks)

    def failure(self, call_id: int, error: types_pb2.Error) -> pb.TokenizeResult:
        return pb.TokenizeResult(id=call_id, error=error)


class Echo(tokenizer_pb2_grpc.TokenizerServiceServicer):
    def __init__(self, dispatch: Dispatch) -> None:
        self.dispatch = dispatch

    async def Tokenize(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        server = CallServer(EchoServerCodec(), self.dispatch, max_calls=50)
        async for frame in server.frames(request_iterator):
            yield frame


@asynccontextmanager
async def serving(dispatch: Dispatch, listen: str = "127.0.0.1:0") -> AsyncIterator[int]:
    server = Server(listen, ["headrace.v1.TokenizerService"])
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(Echo(dispatch), server.grpc_server)
    port = await server.start()
    try:
        yield port
    finally:
        await server.stop()


@asynccontextmanager
async def client_of(port: int, **limits: int) -> AsyncIterator[CallClient[Any, Any, Any, Any]]:
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options.CHANNEL)
    stub: Any = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
    client: CallClient[Any, Any, Any, Any] = CallClient("echo", stub.Tokenize, Codec(), **limits)
    client.start()
    try:
        yield client
    finally:
        await client.close()
        await channel.close()


async def ask(client: CallClient[Any, Any, Any, Any], text: str, timeout_s: float = 20) -> str:
    call = pb.TokenizeCall(id=client.next_id(), decode=pb.DecodeRequest(model=text))
    result: pb.TokenizeResult = await client.call(call, timeout_s=timeout_s)
    return result.decode.text


def reply(call: pb.TokenizeCall) -> pb.TokenizeResult:
    return pb.TokenizeResult(id=call.id, decode=pb.DecodeResponse(text=call.decode.model[::-1]))


def slowly(call: pb.TokenizeCall) -> Awaitable[pb.TokenizeResult]:
    async def answer() -> pb.TokenizeResult:
        await asyncio.sleep(0.001 * (call.id % 7))
        return reply(call)

    return answer()


def hanging() -> tuple[asyncio.Event, asyncio.Event, Dispatch]:
    """A dispatch that never answers; set when a call runs, and when one was stopped."""
    running, stopped = asyncio.Event(), asyncio.Event()

    async def hang(call: pb.TokenizeCall) -> pb.TokenizeResult:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return reply(call)

    return running, stopped, hang


@pytest.mark.parametrize("dispatch", [reply, slowly])
async def test_answers_find_their_calls_whatever_their_length(dispatch: Dispatch) -> None:
    texts = [f"{i}-" * (1 + (i % 5) * 9000) for i in range(40)]
    async with serving(dispatch) as port, client_of(port) as client:
        answers = await asyncio.gather(*(ask(client, t) for t in texts))
    assert answers == [t[::-1] for t in texts]


async def test_errors_belong_to_their_call_and_hide_what_is_internal() -> None:
    def dispatch(call: pb.TokenizeCall) -> pb.TokenizeResult:
        if call.decode.model == "bad":
            raise InvalidArgument("no good", field="model")
        if call.decode.model == "bug":
            raise RuntimeError("a secret")
        return reply(call)

    async with serving(dispatch) as port, client_of(port) as client:
        answers = await asyncio.gather(
            ask(client, "bad"), ask(client, "bug"), ask(client, "ok"), return_exceptions=True
        )
    assert isinstance(answers[0], InvalidArgument)
    assert answers[0].field == "model"
    assert isinstance(answers[1], Internal)
    assert "secret" not in str(answers[1])
    assert answers[2] == "ko"


async def test_a_cancelled_call_is_cancelled_at_the_server() -> None:
    running, stopped, hang = hanging()
    async with serving(hang) as port, client_of(port) as client:
        task = asyncio.create_task(ask(client, "x"))
        await running.wait()
        task.cancel()
        async with asyncio.timeout(10):
            await stopped.wait()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_client_that_leaves_takes_its_calls_along() -> None:
    running, stopped, hang = hanging()
    async with serving(hang) as port:
        async with client_of(port) as client:
            task = asyncio.create_task(ask(client, "x"))
            await running.wait()
        with pytest.raises(Unavailable, match="was closed"):
            await task
        async with asyncio.timeout(10):
            await stopped.wait()


async def test_unanswered_calls_go_again_to_a_server_that_returns() -> None:
    seen = asyncio.Event()

    async def hang(call: pb.TokenizeCall) -> pb.TokenizeResult:
        seen.set()
        await asyncio.Event().wait()
        return reply(call)

    async with serving(hang) as port, client_of(port) as client:
        task = asyncio.create_task(ask(client, "abc"))
        await seen.wait()
        server_gone = port
    # Both are closed now; once more with a client that outlives its server.
    with pytest.raises(Unavailable):
        await task
    async with client_of(server_gone) as client:
        async with serving(hang, f"127.0.0.1:{server_gone}"):
            seen.clear()
            task = asyncio.create_task(ask(client, "abc"))
            await seen.wait()
        assert not task.done()
        async with serving(reply, f"127.0.0.1:{server_gone}"):
            assert await task == "cba"


async def test_a_call_that_is_there_at_every_break_is_given_up() -> None:
    """It may be what breaks the server."""
    seen = asyncio.Event()

    async def hang(call: pb.TokenizeCall) -> pb.TokenizeResult:
        seen.set()
        await asyncio.Event().wait()
        return reply(call)

    async with serving(hang) as port:
        pass
    async with client_of(port) as client:
        task = asyncio.create_task(ask(client, "abc", timeout_s=60))
        for _ in range(3):
            async with serving(hang, f"127.0.0.1:{port}"):
                await seen.wait()
                seen.clear()
        async with serving(hang, f"127.0.0.1:{port}"):
            with pytest.raises(Unavailable, match="3 times"):
                await task


async def test_nobody_there_and_no_answer_are_told_apart() -> None:
    async def hang(call: pb.TokenizeCall) -> pb.TokenizeResult:
        await asyncio.Event().wait()
        return reply(call)

    async with serving(hang) as port, client_of(port) as client:
        with pytest.raises(DeadlineExceeded, match="did not answer"):
            await ask(client, "x", timeout_s=0.5)
    async with client_of(port) as client:
        with pytest.raises(Unavailable, match="not reachable"):
            await ask(client, "x", timeout_s=0.5)


async def test_both_ends_bound_the_calls_in_flight() -> None:
    async def hang(call: pb.TokenizeCall) -> pb.TokenizeResult:
        await asyncio.Event().wait()
        return reply(call)

    async with serving(hang) as port, client_of(port, max_calls=60) as client:
        tasks = [asyncio.create_task(ask(client, str(i))) for i in range(61)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 11:
            more, _ = await asyncio.wait(set(tasks) - done, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        assert all(isinstance(t.exception(), ResourceExhausted) for t in done)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_taken_port_is_refused_by_name() -> None:
    from headrace.errors import StartupError

    async with serving(reply) as port:
        second = Server(f"127.0.0.1:{port}", [])
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}"):
            await second.start()
