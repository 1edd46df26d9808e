"""The loops and the HTTP client, against a plain server of OpenAI's API that misbehaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from itertools import islice
from typing import Any

import pytest
from aiohttp import web

from headrace.bench.clients import HttpClient, Options, client_for
from headrace.bench.load import Level, run_level, warm_up
from headrace.bench.workload import Synthetic, arrivals
from headrace.errors import StartupError


class Plain:
    """Says "a" so often as it is asked to; not ours."""

    def __init__(self) -> None:
        self.port = 0
        self.bodies: list[dict[str, Any]] = []
        self.fault = ""
        self.answers = asyncio.Event()
        self.answers.set()
        self.in_flight = self.most_in_flight = 0
        self.connections: set[Any] = set()
        #: Ten are under way.
        self.full = asyncio.Event()

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/chat/completions", self.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        return runner

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "plain"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.bodies.append(body)
        self.connections.add(request.transport)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self.in_flight >= 10:
            self.full.set()
        try:
            await self.answers.wait()
            return await self.answer(request, body)
        finally:
            self.in_flight -= 1

    async def answer(self, request: web.Request, body: Any) -> web.StreamResponse:
        if self.fault == "busy":
            return web.json_response({"error": {"message": "too many"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        await response.write(b": a comment\n\ndata: " + json.dumps(role).encode() + b"\n\n")
        for number in range(body["max_tokens"]):
            if self.fault == "cut" and number == 1:
                assert request.transport is not None
                request.transport.abort()
                return response
            if self.fault == "error" and number == 1:
                await response.write(b'data: {"error": {"message": "no more"}}\n\n')
                return response
            data = json.dumps({"choices": [{"delta": {"content": "a"}}]}).encode()
            # In two pieces: events need not come whole.
            await response.write(b"data: " + data[:9])
            await response.write(data[9:] + b"\r\n\r\n" if number % 2 else data[9:] + b"\n\n")
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        await response.write(b"data: %b\n\n" % json.dumps({"choices": [], "usage": usage}).encode())
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def plain() -> AsyncIterator[Plain]:
    server = Plain()
    runner = await server.start()
    yield server
    server.answers.set()
    await runner.cleanup()


async def run(plain: Plain, level: Level, output_len: int = 4, **options: Any) -> Any:
    client = HttpClient(f"http://127.0.0.1:{plain.port}/v1", Options(**options))
    assert await client.open() == "plain"
    try:
        return await run_level(client, Synthetic(5, output_len).stream(), level)
    finally:
        await client.close()


async def test_a_closed_loop(plain: Plain) -> None:
    summary, samples = await run(plain, Level(concurrency=3, num_requests=20))
    assert (summary.requests, summary.succeeded, summary.errors) == (20, 20, {})
    assert (summary.output_tokens, summary.prompt_tokens) == (80, 140)
    assert [len(sample.deltas) for sample in samples] == [4] * 20
    assert plain.most_in_flight <= 3
    assert len(plain.connections) <= 3, "connections are kept"
    assert summary.itl_s.count == 60
    body = plain.bodies[0]
    assert body["stream"]
    assert body["stream_options"] == {"include_usage": True}
    assert "ignore_eos" not in body, "OpenAI would refuse it"


async def test_an_open_loop_counts_from_the_intended_moment(plain: Plain) -> None:
    """All are meant at once, and the server stalls: the stall is in every figure."""
    plain.answers.clear()
    level = Level(rate=1000.0, arrivals=arrivals(1000.0, "constant", 0), num_requests=10)
    running = asyncio.create_task(run(plain, level))
    await plain.full.wait()
    stalled_at = time.perf_counter()
    plain.answers.set()
    summary, samples = await running
    assert summary.succeeded == 10
    for number, sample in enumerate(samples):
        assert sample.sent_at >= sample.meant_at
        assert sample.meant_at + sample.ttft_s >= stalled_at, number
    moments = sorted(sample.meant_at for sample in samples)
    assert moments[9] - moments[0] == pytest.approx(0.009)


async def test_a_level_ends_by_time(plain: Plain) -> None:
    summary, _ = await run(plain, Level(concurrency=2, duration_s=0.2))
    assert summary.succeeded > 0
    assert plain.in_flight == 0


@pytest.mark.parametrize(
    ("fault", "kind", "detail"),
    [
        ("busy", "HTTP 429", "too many"),
        ("cut", "connection", "ended early"),
        ("error", "error in the stream", "no more"),
    ],
)
async def test_failures_are_counted_by_kind(
    plain: Plain, fault: str, kind: str, detail: str
) -> None:
    plain.fault = fault
    summary, _ = await run(plain, Level(concurrency=2, num_requests=4))
    assert (summary.succeeded, summary.errors) == (0, {kind: 4})
    assert detail in summary.examples[kind]


async def test_a_request_that_takes_too_long(plain: Plain) -> None:
    plain.answers.clear()
    summary, _ = await run(plain, Level(concurrency=1, num_requests=1), timeout_s=0.1)
    assert summary.errors == {"timeout": 1}


async def test_a_server_that_closes_idle_connections(plain: Plain) -> None:
    client = HttpClient(f"http://127.0.0.1:{plain.port}/v1", Options())
    await client.open()
    prompts = Synthetic(5, 2).stream()
    await warm_up(client, prompts, 3)
    for transport in plain.connections:
        transport.close()
    summary, _ = await run_level(client, prompts, Level(concurrency=3, num_requests=6))
    await client.close()
    assert summary.errors == {}
    assert len(plain.bodies) == 9, "warm-up counts for nothing"


async def test_nothing_there() -> None:
    client = HttpClient("http://127.0.0.1:1/v1", Options())
    with pytest.raises(StartupError, match="nothing answers at"):
        await client.open()
    with pytest.raises(StartupError, match="must be grpc"):
        client_for("127.0.0.1:80", Options())
    assert list(islice(arrivals(1, "constant", 0), 2)) == [0.0, 1.0]
