"""The HTTP edge on a real server, over a pipeline that the test drives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import uvloop
from aiohttp import web

from headrace.blocks import pack_tokens
from headrace.errors import HeadraceError, NotFound
from headrace.logprobs import TokenLogprobs, pack
from headrace.registry import ModelCard
from headrace.telemetry import Span
from services.gateway.generation import GenerationRequest, ServedModel, Sink, Usage
from services.gateway.http.app import create_app
from services.gateway.modalities import check_modality
from services.gateway.parsers import AnswerFormat

MODEL = "org/echo"
DEADLINE_S = 20.0


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """The loop that the gateway runs on: its transports have ways of their own."""
    return {"uvloop": uvloop.new_event_loop}


class Words:
    """The vocabulary of a prompt: an id is a word's place in it."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def spelled(self, token_id: int) -> bytes:
        return self._words[token_id].encode() if token_id < len(self._words) else b""


class EchoGeneration:
    """Says the prompt's words again, one a loop turn, for each of the n sequences."""

    def __init__(self, pipeline: EchoPipeline, request: GenerationRequest, sink: Sink) -> None:
        self.request = request
        self.cancelled = asyncio.Event()
        self.num_steps = 0
        self._pipeline = pipeline
        self._sink = sink
        self._words = _words(request)
        self.vocabulary = Words(self._words)
        self.prompt_ids = pack_tokens(range(len(self._words)))
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._step)

    def cancel(self) -> None:
        self.cancelled.set()

    def resume(self) -> None:
        """Go on after a pause."""
        self._pipeline.pause_after = None
        self._step()

    def _step(self) -> None:
        if self.cancelled.is_set():
            return
        step, pipeline = self.num_steps, self._pipeline
        if pipeline.fail_after is not None and step == pipeline.fail_after[0]:
            self._sink.on_error(pipeline.fail_after[1])
            return
        if step == pipeline.pause_after:
            pipeline.paused.set()
            return
        limit = self.request.sampling.max_tokens or pipeline.max_steps
        if step == min(limit, pipeline.max_steps):
            self._end("length")
        elif step == len(self._words) and not self.request.sampling.ignore_eos:
            self._end("stop")
        else:
            self.num_steps += 1
            word = self._words[step % len(self._words)]
            for index in range(self.request.n):
                self._sink.on_delta(index, word, [step], self._scores(step, index))
            self._loop.call_soon(self._step)

    def _scores(self, step: int, index: int) -> bytes:
        """The later the sequence, the likelier its tokens."""
        count = self.request.sampling.logprobs
        if count is None:
            return b""
        token = step % len(self._words)
        top = [((token + rank) % len(self._words), -0.5 - rank) for rank in range(count)]
        return pack([TokenLogprobs((token, -1.0 / (1 + index)), top)])

    def _end(self, reason: Any) -> None:
        for index in range(self.request.n):
            self._sink.on_end(index, reason)
        tokens = self.num_steps * self.request.n
        self._sink.on_done(Usage(len(self._words), tokens, len(self._words) // 2))


@dataclass
class EchoPipeline:
    """A pipeline whose model repeats what it is told."""

    is_up: bool = True
    format: AnswerFormat = field(default_factory=AnswerFormat)
    served: bool = True
    #: Sequences end here, whatever was asked.
    max_steps: int = 10**9
    #: Raised by the next starts.
    refusal: BaseException | None = None
    #: (step, error): fail there.
    fail_after: tuple[int, HeadraceError] | None = None
    #: Stop at this step until `resume`.
    pause_after: int | None = None
    paused: asyncio.Event = field(default_factory=asyncio.Event)
    generations: list[EchoGeneration] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, request: GenerationRequest, sink: Sink, span: Span) -> EchoGeneration:
        if request.model != MODEL:
            raise NotFound(f"no worker serves {request.model!r}", field="model")
        if self.refusal is not None:
            raise self.refusal
        generation = EchoGeneration(self, request, sink)
        self.generations.append(generation)
        self.started.set()
        return generation

    def models(self) -> list[ServedModel]:
        if not self.served:
            return []
        return [ServedModel(MODEL, 1700000000, 2048, 1, "rev", "digest", 16, ("text",))]

    def answer_format(self, model: str) -> AnswerFormat:
        return self.format

    def check_serves(self, model: str, modality: str) -> None:
        if model != MODEL:
            raise NotFound(f"no worker serves {model!r}", field="model")
        check_modality(ModelCard(MODEL, "rev", "digest", 2048, 16), modality)

    def is_ready(self) -> bool:
        return self.is_up


@dataclass
class Edge:
    """A running edge."""

    pipeline: EchoPipeline
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


MakeEdge = Callable[..., Awaitable[Edge]]


@pytest.fixture
async def make_edge() -> AsyncIterator[MakeEdge]:
    """Start edges with limits of the test's own."""
    runners: list[web.AppRunner] = []

    async def make(**limits: int) -> Edge:
        pipeline = EchoPipeline()
        app = create_app(pipeline, **{"max_body_len": 4 << 20, **limits})
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        return Edge(pipeline, host, port)

    yield make
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def edge(make_edge: MakeEdge) -> Edge:
    """An edge with the usual limits."""
    return await make_edge()


@pytest.fixture
async def client(edge: Edge) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client of `edge`."""
    async with openai.AsyncOpenAI(
        base_url=f"{edge.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S
    ) as client:
        yield client


@dataclass
class RawResponse:
    """An answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        return self.json()["error"]


class RawConnection:
    """A connection on which a test writes what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def post(
        self, path: str, body: bytes | dict[str, Any], *, version: str = "1.1", headers: str = ""
    ) -> None:
        """Send a whole request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/{version}\r\nHost: edge\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n{headers}\r\n"
        )
        self.send(head.encode() + data)

    async def head(self) -> RawResponse:
        """Read a status line and headers."""
        async with asyncio.timeout(DEADLINE_S):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = text.rstrip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return RawResponse(int(status.split(" ")[1]), headers, b"")

    async def chunk(self) -> bytes:
        """Read one chunk of a chunked body; empty at its end."""
        async with asyncio.timeout(DEADLINE_S):
            length = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(length + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def response(self) -> RawResponse:
        """Read a whole answer."""
        answer = await self.head()
        async with asyncio.timeout(DEADLINE_S):
            if answer.headers.get("transfer-encoding") == "chunked":
                while data := await self.chunk():
                    answer.body += data
            elif "content-length" in answer.headers:
                length = int(answer.headers["content-length"])
                answer.body = await self.reader.readexactly(length)
            else:
                answer.body = await self.reader.read()
        return answer

    async def is_closed(self) -> bool:
        """Wait for the server to end the connection; True if nothing came before."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return await self.reader.read() == b""
            except ConnectionResetError:
                return True


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[Edge], Awaitable[RawConnection]]]:
    """Open raw connections."""
    opened: list[RawConnection] = []

    async def open_connection(edge: Edge) -> RawConnection:
        connection = RawConnection(*await asyncio.open_connection(edge.host, edge.port))
        opened.append(connection)
        return connection

    yield open_connection
    for connection in opened:
        connection.writer.close()
        await asyncio.gather(connection.writer.wait_closed(), return_exceptions=True)


@pytest.fixture
def events() -> Callable[[bytes], list[Any]]:
    """Split a stream's body into its events; the last one is "[DONE]" if it went well."""

    def split(body: bytes) -> list[Any]:
        parts = body.decode().split("\n\n")
        assert parts.pop() == ""
        data = [part.removeprefix("data: ") for part in parts]
        return [item if item == "[DONE]" else json.loads(item) for item in data]

    return split


def _words(request: GenerationRequest) -> list[str]:
    if request.token_ids is not None:
        return [f"<{token}>" for token in request.token_ids]
    text = request.messages[-1].content if request.messages else request.prompt or ""
    return [word + " " for word in text.split(" ")] or [""]
