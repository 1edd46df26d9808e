"""Requests that are wrong below the level of parameters."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

MODEL = "org/echo"
CHAT = "/v1/chat/completions"
GOOD = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}


async def test_declared_body_over_the_limit_is_refused_unread(edge: Any, connect: Any) -> None:
    connection = await connect(edge)
    length = 10 << 20
    connection.send(f"POST {CHAT} HTTP/1.1\r\nHost: e\r\nContent-Length: {length}\r\n\r\n".encode())
    answer = await connection.response()
    assert answer.status == 413
    assert str(length) in answer.error()["message"]
    assert str(4 << 20) in answer.error()["message"]
    assert answer.headers["connection"] == "close"
    assert edge.pipeline.generations == []


async def test_whole_body_over_the_limit_is_refused(edge: Any, connect: Any) -> None:
    connection = await connect(edge)
    connection.post(CHAT, b'"' + b"x" * (10 << 20) + b'"')
    answer = await connection.response()
    assert answer.status == 413
    assert str(4 << 20) in answer.error()["message"]


async def test_chunked_body_over_the_limit_is_refused(make_edge: Any, connect: Any) -> None:
    edge = await make_edge(max_body_len=1000)
    connection = await connect(edge)
    connection.send(
        f"POST {CHAT} HTTP/1.1\r\nHost: e\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    )
    connection.send(b"400\r\n" + b" " * 1024 + b"\r\n")
    answer = await connection.response()
    assert answer.status == 413
    assert "1000" in answer.error()["message"]
    assert "1024" in answer.error()["message"]


async def test_compressed_body_counts_as_unpacked(make_edge: Any, connect: Any) -> None:
    edge = await make_edge(max_body_len=100_000)
    connection = await connect(edge)
    connection.post(CHAT, gzip.compress(b" " * 10_000_000), headers="Content-Encoding: gzip\r\n")
    assert (await connection.response()).status == 413


async def test_compressed_body(edge: Any, connect: Any) -> None:
    connection = await connect(edge)
    data = gzip.compress(json.dumps(GOOD).encode())
    connection.post(CHAT, data, headers="Content-Encoding: gzip\r\n")
    assert (await connection.response()).status == 200


async def test_broken_compression(edge: Any, connect: Any) -> None:
    connection = await connect(edge)
    connection.post(CHAT, b"not gzip at all", headers="Content-Encoding: gzip\r\n")
    answer = await connection.response()
    assert answer.status == 400
    assert answer.error()["type"] == "invalid_request_error"


async def test_expectation_is_met(edge: Any, connect: Any) -> None:
    connection = await connect(edge)
    data = json.dumps(GOOD).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: e\r\nExpect: 100-continue\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.send(head.encode())
    assert (await connection.head()).status == 100
    connection.send(data)
    assert (await connection.response()).status == 200


async def test_expectation_of_too_much_is_refused(edge: Any, connect: Any) -> None:
    connection = await connect(edge)
    connection.send(
        f"POST {CHAT} HTTP/1.1\r\nHost: e\r\nExpect: 100-continue\r\n"
        f"Content-Length: {10 << 20}\r\n\r\n".encode()
    )
    assert (await connection.response()).status == 413


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "truncated after its 0 bytes"),
        (b'{"model": "m", ', "truncated after its 15 bytes"),
        (b'{"model": "m"] ', "byte 13"),
        (b'{"model": nul}', "byte 14"),
        (b"model=m", "byte 0"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b'{"model": "\\ud800x"}', "not valid JSON"),
        (b'{"model": "m", "tools": [' + b"[" * 200_000, "nested too deeply"),
        (b"[]", "the body must be an object, not an array"),
        (b"null", "the body must be an object, not null"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_malformed_json(edge: Any, connect: Any, path: str, body: bytes, says: str) -> None:
    if path != CHAT:
        body = body.replace(b"tools", b"prompt")
        says = says.replace("nested too deeply", "prompt[0][0] must be")
    connection = await connect(edge)
    connection.post(path, body)
    answer = await connection.response()
    assert answer.status == 400
    assert says in answer.error()["message"]
    assert answer.error()["type"] == "invalid_request_error"


async def test_content_type_does_not_matter(edge: Any, connect: Any) -> None:
    connection = await connect(edge)
    data = json.dumps(GOOD).encode()
    connection.send(
        f"POST {CHAT} HTTP/1.1\r\nHost: e\r\nContent-Type: text/plain; charset=latin-1\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    assert (await connection.response()).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/chat/completions/", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PATCH", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_routes_that_are_not_there(
    edge: Any, connect: Any, method: str, path: str, status: int, code: str
) -> None:
    connection = await connect(edge)
    connection.send(f"{method} {path} HTTP/1.1\r\nHost: e\r\n\r\n".encode())
    answer = await connection.response()
    assert answer.status == status
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.error()["code"] == code
    assert path in answer.error()["message"]
    assert answer.headers["x-request-id"].startswith("req-")
    if status == 405:
        assert answer.headers["allow"]


async def test_health(edge: Any, connect: Any) -> None:
    connection = await connect(edge)

    async def get(path: str) -> Any:
        connection.send(f"GET {path} HTTP/1.1\r\nHost: e\r\n\r\n".encode())
        return await connection.response()

    assert (await get("/health/live")).status == 200
    assert (await get("/health/ready")).status == 200
    edge.pipeline.is_up = False
    answer = await get("/health/ready")
    assert answer.status == 503
    assert "out of reach" in answer.json()["reason"]
    edge.pipeline.served = False
    assert "no worker" in (await get("/health/ready")).json()["reason"]
    assert (await get("/health/live")).status == 200
