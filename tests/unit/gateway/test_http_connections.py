"""Old, idle, slow and too many connections, on a real gateway."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import aiohttp
import grpc
import pytest

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2
from headrace.v1.inference_pb2_grpc import InferenceServiceStub
from services.gateway.connections import affordable_connections


async def connect(mesh: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", mesh.gateway.http_port)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    # It may have been cut.
    with suppress(ConnectionError):
        await writer.wait_closed()


def a_post(body: Any, length: int | None = None) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def test_two_edges_share_the_open_files() -> None:
    assert affordable_connections(20_000, 1 << 20) == 20_000
    assert affordable_connections(20_000, 20_512) == 10_000
    assert affordable_connections(20_000, 100) == 1


async def test_an_old_http_connection_is_closed_after_an_answer(mesh: Any) -> None:
    await mesh.start(num_workers=1, connection_max_age_s=0.2)
    url = f"http://127.0.0.1:{mesh.gateway.http_port}/v1/completions"
    body = {"model": "bytes", "prompt": "hello", "max_tokens": 4}
    said: list[str | None] = []
    async with aiohttp.ClientSession() as session:

        async def ask() -> bool:
            async with session.post(url, json=body) as response:
                assert response.status == 200
                assert (await response.json())["choices"][0]["text"] == "abcd"
                said.append(response.headers.get("Connection"))
            return said.count("close") >= 3

        async with asyncio.timeout(20):
            while not await ask():
                pass
    assert None in said, "young connections are kept"


async def test_no_age_means_for_ever(mesh: Any) -> None:
    await mesh.start(num_workers=1, connection_max_age_s=0.0)
    reader, writer = await connect(mesh)
    for _ in range(3):
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"close" not in head
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]))
    await close(writer)


async def test_an_old_grpc_connection_ages_out_without_a_failed_call(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.h2.connection.TICK_S", 0.05)
    await mesh.start(num_workers=1, connection_max_age_s=0.2)
    stub = InferenceServiceStub(mesh.channel())
    peers: set[str] = set()
    sampling = types_pb2.SamplingParams(max_tokens=4)
    request = pb.GenerateRequest(model="bytes", prompt="hello", sampling=sampling)
    server = mesh.gateway._server
    async with asyncio.timeout(30):
        while len(peers) < 3:
            call = stub.Generate(request)
            assert "".join([r.text async for r in call]) == "abcd"
            peers |= {connection.peer for connection in server._connections}
    assert await call.code() is grpc.StatusCode.OK


async def test_connections_beyond_the_limit_are_told(mesh: Any) -> None:
    await mesh.start(num_workers=1, max_connections=2)
    inside = [await connect(mesh) for _ in range(2)]
    await mesh.eventually(lambda: mesh.gateway.connections.num_open == 2)
    reader, writer = await connect(mesh)
    writer.write(a_post({"model": "bytes", "prompt": "hello"}))
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
    await close(writer)
    await close(inside[0][1])
    await mesh.eventually(lambda: mesh.gateway.connections.num_open == 1)
    reader, writer = await connect(mesh)
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    await close(writer)
    await close(inside[1][1])


async def test_a_body_that_does_not_come_is_not_waited_for(mesh: Any) -> None:
    await mesh.start(num_workers=1, http_body_timeout_s=0.2)
    reader, writer = await connect(mesh)
    writer.write(a_post({"model": "bytes", "prompt": "hello"}, length=1000))
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_slow"
    await close(writer)


async def test_a_head_that_does_not_end_is_not_waited_for(mesh: Any) -> None:
    await mesh.start(num_workers=1, http_idle_s=0.3)
    reader, writer = await connect(mesh)
    writer.write(b"GET /health/live HTTP/1.1\r\n")
    dripping = asyncio.create_task(_drip(writer))
    assert await reader.read() == b""
    dripping.cancel()
    await mesh.eventually(lambda: mesh.gateway.connections.num_open == 0)
    await close(writer)


async def _drip(writer: asyncio.StreamWriter) -> None:
    number = 0
    while not writer.is_closing():
        writer.write(f"X-{number}: y\r\n".encode())
        number += 1
        await asyncio.sleep(0.05)


async def test_a_client_that_stops_reading_is_cut_with_a_reason(
    mesh: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await mesh.start(num_workers=1, client_read_timeout_s=0.3, max_client_buffer_len=1 << 30)
    worker = mesh.workers[0]
    worker.step_s, worker.tokens_per_step = 0.0, 100
    reader, writer = await connect(mesh)
    # Its window is small and stays full.
    body = {"model": "bytes", "prompt": "x", "max_tokens": 19_000, "stream": True, "n": 16}
    writer.transport.pause_reading()
    writer.write(a_post(body))
    await mesh.eventually(lambda: "unread for" in caplog.text, "it is cut")
    await mesh.eventually(lambda: mesh.pipeline.num_running == 0)
    await mesh.eventually(lambda: mesh.gateway.connections.num_open == 0)
    await close(writer)
    assert reader is not None
