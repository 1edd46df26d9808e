"""HTTP/2 by hand, to say to the gRPC edge what no client library would."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hpack import Decoder, Encoder

from services.gateway.h2 import wire

ECHO = "/test.Echo/Say"


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream_id: int
    payload: bytes


class RawClient:
    """One connection. Made by `connect`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.encoder = Encoder()
        self.decoder = Decoder()

    @classmethod
    async def connect(cls, port: int, *, greet: bool = True) -> RawClient:
        client = cls(*await asyncio.open_connection("127.0.0.1", port))
        if greet:
            client.send(wire.PREFACE + wire.frame(wire.SETTINGS, 0, 0))
        return client

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    def headers(self, stream_id: int, flags: int = wire.END_HEADERS, **changes: Any) -> bytes:
        """A gRPC call's headers; `changes` by name (- as _, : as p_), None leaves one out."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": ECHO,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        for name, value in changes.items():
            fields[name.replace("p_", ":", 1).replace("_", "-")] = value
        block = self.encoder.encode([(k, v) for k, v in fields.items() if v is not None])
        return wire.frame(wire.HEADERS, flags, stream_id, block)

    def message(self, stream_id: int, data: bytes, *, last: bool = True, flag: int = 0) -> bytes:
        body = bytes([flag]) + len(data).to_bytes(4, "big") + data
        frames = [body[at : at + wire.MAX_FRAME_LEN] for at in range(0, len(body), 16384)]
        return b"".join(
            wire.frame(wire.DATA, wire.END_STREAM * (last and part is frames[-1]), stream_id, part)
            for part in frames
        )

    async def frame(self) -> Frame | None:
        """The next frame; None when the server closed."""
        try:
            head = await asyncio.wait_for(self.reader.readexactly(wire.HEAD_LEN), 20)
            payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return Frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)

    async def until(self, kind: int, stream_id: int | None = None) -> Frame:
        """The next frame of a kind. Fails if the connection ends before."""
        while True:
            frame = await self.frame()
            assert frame is not None, "the connection is closed"
            if frame.kind == kind and stream_id in (None, frame.stream_id):
                return frame

    async def status(self, stream_id: int) -> dict[str, str]:
        """How a call ends: the headers of its last frame."""
        while True:
            frame = await self.until(wire.HEADERS)
            fields = {str(k): str(v) for k, v in self.decoder.decode(frame.payload)}
            if frame.stream_id == stream_id and frame.flags & wire.END_STREAM:
                return fields

    async def goaway(self) -> tuple[int, str]:
        """The code and text of a GOAWAY, after which the server closes."""
        frame = await self.until(wire.GOAWAY)
        while await self.frame() is not None:
            pass
        return int.from_bytes(frame.payload[4:8], "big"), frame.payload[8:].decode()

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()
