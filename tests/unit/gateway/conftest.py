"""A small mesh around a real gateway: real gRPC servers that speak the true protocol.

Vocabulary: ids 0 to 255 are bytes, 256 is the end token (special), 257 is "<tool>".
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from headrace.blocks import block_ids, pack_tokens
from headrace.rpc.calls import CallServer, ServerCodec
from headrace.v1 import (
    router_pb2,
    router_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
    types_pb2,
)
from services.gateway.app import Gateway
from services.gateway.config import GatewayConfig
from tests.unit.gateway.fake_worker import EOS, FakeWorker, letters, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

TOOL = 257
DIGEST = "digest-of-bytes"


async def eventually(condition: Callable[[], Any], what: str = "", timeout_s: float = 20.0) -> Any:
    """Wait until `condition` returns something true, and return that."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"never: {what or condition}"
        await asyncio.sleep(0.005)
    return value


class Codec(ServerCodec[Any, Any, Any, Any]):
    """Either hop's server end; `extra` makes frames of their own."""

    def __init__(self, response: Any, result: Any, call: Any) -> None:
        self.types = response, result, call
        self.extra: list[Any] = []
        self.seen: list[Any] = []

    def calls(self, request: Any) -> Any:
        self.seen.append(request)
        return request.calls, request.chunks, request.cancels

    def parse_call(self, data: bytes) -> Any:
        return self.types[2].FromString(data)

    def has_more(self) -> bool:
        return bool(self.extra)

    def response(self, results: Any, chunks: Any) -> Any:
        response = self.extra.pop(0) if self.extra else self.types[0]()
        response.results.extend(results)
        if chunks:
            response.chunks.extend(chunks)
        return response

    def failure(self, call_id: int, error: Any) -> Any:
        return self.types[1](id=call_id, error=error)


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """One token per byte."""

    def __init__(self) -> None:
        self.digest = DIGEST
        self.encodes: list[Any] = []
        self.num_lists = 0
        self.strips_first_space = False
        #: What a template writes to open an answer; its source.
        self.opening = ""
        self.template = ""
        self.answers = asyncio.Event()
        self.answers.set()

    async def Tokenize(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        codec = Codec(
            tokenizer_pb2.TokenizeResponse, tokenizer_pb2.TokenizeResult, tokenizer_pb2.TokenizeCall
        )
        async for response in CallServer(codec, self.encode).frames(requests):
            yield response

    async def encode(self, call: Any) -> Any:
        self.encodes.append(call)
        await self.answers.wait()
        if call.HasField("render_chat"):
            text = self.chat_text(call.render_chat.chat)
            answer = tokenizer_pb2.RenderChatResponse(text=text)
            return tokenizer_pb2.TokenizeResult(id=call.id, render_chat=answer)
        if call.HasField("encode_batch"):
            texts = call.encode_batch.texts
            answer = tokenizer_pb2.EncodeBatchResponse(
                token_ids=pack_tokens([*b"".join(texts)]), counts=pack_tokens(map(len, texts))
            )
            return tokenizer_pb2.TokenizeResult(id=call.id, encode_batch=answer)
        encode = call.encode
        given = encode.WhichOneof("input")
        if given == "token_ids":
            packed = encode.token_ids
        elif given == "chat":
            packed = pack_tokens(list(self.chat_text(encode.chat).encode()))
        else:
            packed = pack_tokens(list(encode.text.encode()))
        ids = b"".join(block_ids(packed, encode.block_size, encode.namespace_key))
        answer = tokenizer_pb2.EncodeResponse(
            token_ids=packed, block_ids=ids, tokenizer_digest=self.digest
        )
        return tokenizer_pb2.TokenizeResult(id=call.id, encode=answer)

    def chat_text(self, chat: Any) -> str:
        text = "".join(f"{m.role}:{m.content}\n" for m in chat.messages)
        return text + self.opening if chat.add_generation_prompt else text

    async def GetDetokenizerTable(self, request: Any, context: Any) -> AsyncIterator[Any]:
        pieces = [bytes([value]) for value in range(256)] + [b"<end>", b"<tool>"]
        table = tokenizer_pb2.DetokenizerTable(
            tokenizer_digest=self.digest,
            kind=tokenizer_pb2.DetokenizerTable.KIND_BYTES,
            data=b"".join(pieces),
            lengths=b"".join(len(piece).to_bytes(2, "little") for piece in pieces),
            special=bytes(256) + b"\1\0",
            eos_token_ids=[EOS],
            strips_first_space=self.strips_first_space,
        )
        data = table.SerializeToString()
        for start in range(0, len(data), 100):
            yield tokenizer_pb2.GetDetokenizerTableResponse(data=data[start : start + 100])

    async def ListTokenizers(self, request: Any, context: Any) -> Any:
        self.num_lists += 1
        info = tokenizer_pb2.TokenizerInfo(
            model="bytes", tokenizer_digest=self.digest, chat_template=self.template
        )
        return tokenizer_pb2.ListTokenizersResponse(tokenizers=[info])


class FakeRouter(router_pb2_grpc.RouterServiceServicer):
    """Chooses the first worker that is neither excluded nor reported."""

    def __init__(self) -> None:
        self.card = types_pb2.ModelCard(
            name="bytes",
            revision="r1",
            tokenizer_digest=DIGEST,
            context_len=20_000,
            block_size=16,
            modalities=["text"],
        )
        self.workers: list[FakeWorker] = []
        self.matched_tokens = 0
        self.answers = asyncio.Event()
        self.answers.set()
        self.calls: list[Any] = []
        self.opens: list[Any] = []
        self.failures: list[Any] = []
        self.prefilled: list[int] = []
        self.released: list[int] = []
        self._streams: list[tuple[Codec, Any]] = []

    def fleet(self) -> Any:
        model = router_pb2.FleetModel(card=self.card, workers=[w.ref for w in self.workers])
        return router_pb2.RouteResponse(fleet=router_pb2.Fleet(models=[model]))

    def announce(self) -> None:
        for codec, server in self._streams:
            codec.extra.append(self.fleet())
            server.wake()

    async def Route(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        codec = Codec(router_pb2.RouteResponse, router_pb2.RouteResult, router_pb2.RouteCall)
        server = CallServer(codec, self.select)
        self._streams.append((codec, server))
        codec.extra.append(self.fleet())
        server.wake()
        async for response in server.frames(self._noting(requests)):
            yield response

    async def _noting(self, requests: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if request.HasField("open"):
                self.opens.append(request.open)
            self.failures.extend(request.failures)
            for update in request.updates:
                over = update.event == router_pb2.ReservationUpdate.EVENT_RELEASED
                (self.released if over else self.prefilled).append(update.id)
            yield request

    async def select(self, call: Any) -> Any:
        self.calls.append(call)
        await self.answers.wait()
        dead = {(failure.worker_id, failure.generation) for failure in self.failures}
        for worker in self.workers:
            key = (worker.ref.worker_id, worker.ref.generation)
            if key in dead or worker.ref.worker_id in call.select.exclude_workers:
                continue
            leg = router_pb2.Leg(role=router_pb2.Leg.ROLE_COMPLETE, worker=worker.ref)
            plan = router_pb2.Plan(legs=[leg], matched_tokens=self.matched_tokens)
            return router_pb2.RouteResult(id=call.id, plan=plan)
        error = types_pb2.Error(code=14, message="no worker is left")
        return router_pb2.RouteResult(id=call.id, error=error)


class Sink:
    """Notes all that it hears."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, bytes] = {}
        self.prompt_logprobs: dict[int, bytes] = {}
        self.reasons: dict[int, str] = {}
        self.num_deltas = 0
        self.usage: Any = None
        self.error: Any = None

    @property
    def is_over(self) -> bool:
        return self.usage is not None or self.error is not None

    def on_prompt_logprobs(self, index: int, data: bytes) -> None:
        assert index not in self.token_ids
        self.prompt_logprobs[index] = self.prompt_logprobs.get(index, b"") + data

    def on_delta(self, index: int, text: str, token_ids: list[int], logprobs: bytes = b"") -> None:
        assert not self.is_over
        assert index not in self.reasons
        self.logprobs[index] = self.logprobs.get(index, b"") + logprobs
        self.num_deltas += 1
        self.texts[index] = self.texts.get(index, "") + text
        self.token_ids.setdefault(index, []).extend(token_ids)

    def on_end(self, index: int, reason: str) -> None:
        assert index not in self.reasons
        self.reasons[index] = reason

    def on_done(self, usage: Any) -> None:
        assert not self.is_over
        self.usage = usage

    def on_error(self, error: Any) -> None:
        assert not self.is_over
        self.error = error


class Mesh:
    """Tokenizer, router, `num_workers` workers and a gateway, all on loopback."""

    EOS, TOOL = EOS, TOOL
    eventually = staticmethod(eventually)
    letters = staticmethod(letters)
    new_sink = Sink

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.router = FakeRouter()
        self.gateway: Gateway | None = None
        self.tokenizer_port = 0
        self.router_port = 0
        self._tokenizer_server: Any = None
        self._router_server: Any = None
        self._channels: list[Any] = []

    @property
    def workers(self) -> list[FakeWorker]:
        return self.router.workers

    @property
    def pipeline(self) -> Any:
        return self.gateway.pipeline

    async def start_peers(self, num_workers: int = 2) -> None:
        """All but the gateway."""
        for number in range(num_workers):
            worker = FakeWorker(f"w{number}")
            await worker.start()
            self.workers.append(worker)
        await self.start_tokenizer()
        await self.start_router()

    async def start(self, num_workers: int = 2, **options: Any) -> Mesh:
        await self.start_peers(num_workers)
        config = GatewayConfig(
            tokenizer=f"127.0.0.1:{self.tokenizer_port}",
            router=(f"127.0.0.1:{self.router_port}",),
            http="127.0.0.1:0",
            grpc="127.0.0.1:0",
            **{"drain_timeout_s": 0.0, **options},
        )
        self.gateway = Gateway(config)
        await self.gateway.start()
        if num_workers:
            await eventually(self.pipeline.is_ready, "the gateway is ready")
        return self

    async def add_worker(self, worker_id: str) -> FakeWorker:
        """A worker that joins later."""
        worker = FakeWorker(worker_id)
        await worker.start()
        self.workers.append(worker)
        self.router.announce()
        return worker

    async def start_tokenizer(self) -> None:
        add = tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server
        server, self.tokenizer_port = serve(self.tokenizer, add, self.tokenizer_port)
        self._tokenizer_server = server
        await server.start()

    async def stop_tokenizer(self) -> None:
        await self._tokenizer_server.stop(0)

    async def start_router(self) -> None:
        add = router_pb2_grpc.add_RouterServiceServicer_to_server
        server, self.router_port = serve(self.router, add, self.router_port)
        self._router_server = server
        await server.start()

    async def stop_router(self) -> None:
        await self._router_server.stop(0)

    def channel(self, options: Any = None) -> Any:
        """A client's channel to the gateway's gRPC edge."""
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.gateway.grpc_port}", options=options)
        self._channels.append(channel)
        return channel

    async def stop(self) -> None:
        for channel in self._channels:
            await channel.close()
        if self.gateway is not None:
            await self.gateway.stop()
            assert self.pipeline.num_running == 0
        await self.stop_router()
        await self.stop_tokenizer()
        for worker in self.workers:
            await worker.kill()


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    """A mesh; the test starts it. Nothing of it may be left running."""
    mesh = Mesh()
    yield mesh
    await mesh.stop()
