"""What clients do to connections: old versions, pipelining, leaving, not reading."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

MODEL = "org/echo"
STREAM = {"model": MODEL, "prompt": "a b c", "stream": True}
#: A stream that ends only when it is cancelled.
ENDLESS = {
    "model": MODEL,
    "prompt": "x" * 1000,
    "stream": True,
    "ignore_eos": True,
    "max_tokens": 10**9,
}
PATH = "/v1/completions"
DEADLINE_S = 20.0


def _texts(events: list[Any]) -> str:
    return "".join(event["choices"][0]["text"] for event in events[:-1])


async def test_stream_over_http_1_1(edge: Any, connect: Any, events: Any) -> None:
    connection = await connect(edge)
    connection.post(PATH, STREAM)
    answer = await connection.response()
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.headers["x-request-id"].startswith("req-")
    assert "content-encoding" not in answer.headers
    parsed = events(answer.body)
    assert parsed[-1] == "[DONE]"
    assert _texts(parsed) == "a b c "


async def test_stream_over_http_1_0_is_not_chunked(edge: Any, connect: Any, events: Any) -> None:
    connection = await connect(edge)
    connection.post(PATH, STREAM, version="1.0")
    answer = await connection.response()
    assert "transfer-encoding" not in answer.headers
    assert _texts(events(answer.body)) == "a b c "
    assert await connection.is_closed()


async def test_http_1_0_keep_alive_ends_after_a_stream(
    edge: Any, connect: Any, events: Any
) -> None:
    connection = await connect(edge)
    connection.post(PATH, STREAM, version="1.0", headers="Connection: keep-alive\r\n")
    answer = await connection.response()
    assert answer.headers.get("connection") != "keep-alive"
    assert _texts(events(answer.body)) == "a b c "


async def test_accept_encoding_changes_nothing(edge: Any, connect: Any, events: Any) -> None:
    connection = await connect(edge)
    connection.post(PATH, STREAM, headers="Accept-Encoding: gzip, deflate, br\r\n")
    answer = await connection.response()
    assert "content-encoding" not in answer.headers
    assert _texts(events(answer.body)) == "a b c "


async def test_long_text_in_one_event(edge: Any, connect: Any, events: Any) -> None:
    word = "é" * 50_000
    connection = await connect(edge)
    connection.post(PATH, {"model": MODEL, "prompt": word, "stream": True})
    assert _texts(events((await connection.response()).body)) == word + " "


async def test_one_connection_serves_many_requests(edge: Any, connect: Any, events: Any) -> None:
    connection = await connect(edge)
    for stream in (True, False, True):
        connection.post(PATH, {**STREAM, "stream": stream})
        answer = await connection.response()
        assert answer.status == 200
        if stream:
            assert _texts(events(answer.body)) == "a b c "
        else:
            assert answer.json()["choices"][0]["text"] == "a b c "


async def test_pipelined_requests_are_answered_in_order(
    edge: Any, connect: Any, events: Any
) -> None:
    connection = await connect(edge)
    for prompt in ("one two", "three", "four"):
        connection.post(PATH, {**STREAM, "prompt": prompt})
    connection.post(PATH, b"{")
    texts = [_texts(events((await connection.response()).body)) for _ in range(3)]
    assert texts == ["one two ", "three ", "four "]
    assert (await connection.response()).status == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_leaving_cancels(edge: Any, connect: Any, stream: bool, how: str) -> None:
    edge.pipeline.pause_after = 2
    connection = await connect(edge)
    connection.post(PATH, {**STREAM, "stream": stream})
    async with asyncio.timeout(DEADLINE_S):
        await edge.pipeline.paused.wait()
    if stream:
        await connection.head()
    generation = edge.pipeline.generations[0]
    assert not generation.cancelled.is_set()
    if how == "reset":
        connection.writer.transport.abort()
    else:
        connection.writer.close()
    async with asyncio.timeout(DEADLINE_S):
        await generation.cancelled.wait()


async def test_leaving_before_the_first_token_cancels(edge: Any, connect: Any) -> None:
    edge.pipeline.pause_after = 0
    connection = await connect(edge)
    connection.post(PATH, STREAM)
    async with asyncio.timeout(DEADLINE_S):
        await edge.pipeline.paused.wait()
    connection.writer.close()
    async with asyncio.timeout(DEADLINE_S):
        await edge.pipeline.generations[0].cancelled.wait()


async def test_leaving_while_tokens_flow_cancels(edge: Any, connect: Any) -> None:
    connections = [await connect(edge) for _ in range(8)]
    for connection in connections:
        connection.post(PATH, ENDLESS)
        await connection.head()
    for connection in connections:
        connection.writer.transport.abort()
    for generation in edge.pipeline.generations:
        async with asyncio.timeout(DEADLINE_S):
            await generation.cancelled.wait()


async def test_headers_come_with_the_first_token(edge: Any, connect: Any) -> None:
    edge.pipeline.pause_after = 1
    connection = await connect(edge)
    connection.post(PATH, STREAM)
    await connection.head()
    assert b'"text":"a "' in await connection.chunk()


async def test_client_that_does_not_read_is_cut(
    make_edge: Any, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    edge = await make_edge(max_client_buffer_len=128 << 10)
    loop = asyncio.get_running_loop()
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.setblocking(False)
        await loop.sock_connect(stalled, (edge.host, edge.port))
        body = json.dumps(ENDLESS).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: edge\r\nContent-Length: {len(body)}\r\n\r\n"
        await loop.sock_sendall(stalled, head.encode() + body)
        async with asyncio.timeout(DEADLINE_S):
            await edge.pipeline.started.wait()
            await edge.pipeline.generations[0].cancelled.wait()
        generation = edge.pipeline.generations[0]
        # What we and the kernel held, in events of 1.1 kB: a few hundred kB, not more.
        assert 128 << 10 < generation.num_steps * 1200 < 2 << 20
    assert "does not read" in caplog.text
    other = await connect(edge)
    other.post(PATH, STREAM)
    assert (await other.response()).status == 200
