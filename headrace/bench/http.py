"""HTTP/1.1 as a load generator needs it: one request at a time on a connection, its body in
pieces as they come. No dependency, and no task or queue per piece.

It knows lengths and chunks (RFC 9112), not what a body means.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

_MAX_HEAD_LEN = 64 << 10


class BrokenError(Exception):
    """The connection ended, or what came is no HTTP."""


class Connection(asyncio.Protocol):
    """One connection. `request` again when the last answer is over and `is_reusable`."""

    def __init__(self) -> None:
        self.is_reusable = False
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._on_head: Callable[[int], None] | None = None
        self._on_body: Callable[[bytes], None] | None = None
        self._done: asyncio.Future[None] | None = None
        self._in_body = False
        self._is_chunked = False
        #: Bytes of the body, or of the chunk and its end, that are still to come; None: all
        #: until the connection closes.
        self._left: int | None = 0

    @classmethod
    async def open(cls, host: str, port: int, tls: ssl.SSLContext | None) -> Connection:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, host, port, ssl=tls)
        return connection

    async def request(
        self, data: bytes, on_head: Callable[[int], None], on_body: Callable[[bytes], None]
    ) -> None:
        """Send one request and wait for its answer's end. `on_head` gets the status, `on_body`
        the body, at once as it comes. Raises BrokenError."""
        if self._transport is None or self._transport.is_closing():
            raise BrokenError("the connection is closed")
        self._on_head, self._on_body = on_head, on_body
        self._in_body, self.is_reusable = False, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            await self._done
        finally:
            self._done = None
            if not self.is_reusable:
                self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._in_body and self._left is None and exc is None:
            self._finish()
        else:
            self._break(f"the connection ended early{f': {exc}' if exc else ''}")
        self.is_reusable = False
        self._transport = None

    def data_received(self, data: bytes) -> None:
        if self._done is None:
            # An answer to nothing: this connection is of no use any more.
            self.close()
            return
        self._buffer += data
        try:
            if self._in_body or self._read_head():
                self._read_body()
        except (ValueError, BrokenError) as error:
            self._break(f"the answer is no HTTP: {error}")
            self.close()

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD_LEN:
                raise BrokenError("its head does not end")
            return False
        head = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, status, *_ = head[0].split(" ", 2)
        if status == "100":
            return self._read_head()
        fields = {
            name.strip().lower(): value.strip().lower()
            for name, _, value in (line.partition(":") for line in head[1:])
        }
        self._is_chunked = "chunked" in fields.get("transfer-encoding", "")
        self._left = int(fields["content-length"]) if "content-length" in fields else None
        if self._is_chunked:
            self._left = 0
        self.is_reusable = (
            version == "HTTP/1.1" and fields.get("connection") != "close" and self._left is not None
        )
        self._in_body = True
        if self._on_head is not None:
            self._on_head(int(status))
        return True

    def _read_body(self) -> None:
        buffer, on_body = self._buffer, self._on_body
        assert on_body is not None
        if not self._is_chunked:
            if buffer:
                on_body(bytes(buffer))
            if self._left is not None:
                self._left -= len(buffer)
            buffer.clear()
            if self._left is not None and self._left <= 0:
                self._finish()
            return
        pieces, at = [], 0
        is_over = False
        while True:
            end = buffer.find(b"\r\n", at)
            if end < 0:
                break
            length = int(buffer[at:end].split(b";")[0], 16)
            if end + 2 + length + 2 > len(buffer):
                break
            at = end + 2 + length + 2
            if length == 0:
                is_over = True
                break
            pieces.append(bytes(buffer[end + 2 : end + 2 + length]))
        del buffer[:at]
        if pieces:
            on_body(b"".join(pieces))
        if is_over:
            self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _break(self, reason: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(BrokenError(reason))
