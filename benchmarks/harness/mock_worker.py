"""A worker that only streams: for proxies, which neither tokenize nor choose tokens.

    python mock_worker.py PORT STEP_MS MODEL

It answers `POST /v1/chat/completions` with `max_tokens` SSE chunks, one to every
stream each STEP_MS, any GET with a list of its model, and any other POST with 404.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import cast

import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _event(choices: list[object], usage: dict[str, int] | None = None) -> bytes:
    body: dict[str, object] = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": sys.argv[3],
        "choices": choices,
    }
    if usage:
        body["usage"] = usage
    return _chunk(b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class Connection(asyncio.Protocol):
    """One connection of a proxy's pool; one request at a time."""

    streams: set[Connection]

    def __init__(self) -> None:
        self._data = bytearray()
        self._left = 0
        self._total = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.streams.discard(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, separator, body = bytes(self._data).partition(b"\r\n\r\n")
        if not separator:
            return
        lengths = [
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ]
        if len(body) < sum(lengths):
            return
        self._data.clear()
        if head.startswith(b"POST /v1/chat/completions "):
            self._left = self._total = json.loads(body)["max_tokens"]
            self._transport.write(_HEAD)
            self.streams.add(self)
        elif head.startswith(b"POST"):
            # Such as /v1/chat/completions/render, by which a proxy may learn token ids.
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        else:
            found = json.dumps({"object": "list", "data": [{"id": sys.argv[3]}]}).encode()
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(found)}\r\n\r\n".encode()
                + found
            )

    def step(self) -> None:
        """One token; after the last one the usage and the end."""
        self._left -= 1
        parts = [_event([{"index": 0, "delta": {"content": " seven"}, "finish_reason": None}])]
        if not self._left:
            self.streams.discard(self)
            usage = {"prompt_tokens": 500, "completion_tokens": self._total}
            parts += [
                _event([{"index": 0, "delta": {}, "finish_reason": "length"}]),
                _event([], usage),
                _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
            ]
        self._transport.write(b"".join(parts))


async def main(port: int, step_s: float) -> None:
    loop = asyncio.get_running_loop()
    Connection.streams = set()
    await loop.create_server(Connection, "127.0.0.1", port)
    due = loop.time()
    while True:
        due = max(due + step_s, loop.time())
        await asyncio.sleep(due - loop.time())
        for stream in list(Connection.streams):
            stream.step()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2]) / 1000))
