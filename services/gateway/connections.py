"""HTTP connections: how many, how old, how idle, how slow. What they carry is no matter here.

A connection beyond the limit is answered with a 503 and closed. One that is old gets
`Connection: close` with its next answer. A client that has read nothing for a while
although output waits is cut; so is a body that takes too long. How much output may wait,
in bytes, is the streams' own limit.
"""

from __future__ import annotations

import asyncio
import logging
import random
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web

from services.gateway.http.errors import HttpError, Problem, error_body

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

log = logging.getLogger("headrace.gateway.http")

#: Open files that are not clients: peers, workers, listeners, logs.
_OTHER_FILES = 512
#: Connections beyond the limit that wait for their refusal, and how long for.
_MAX_REFUSALS = 256
_REFUSAL_S = 5.0
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Times in seconds; `max_age_s` 0: for ever."""

    max_connections: int
    max_age_s: float
    idle_s: float
    read_timeout_s: float


def raise_file_limit() -> int:
    """Let this process open as many files as it may. Returns how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def affordable_connections(wanted: int, num_files: int) -> int:
    """Connections that each of two edges may have with so many open files."""
    return max(1, min(wanted, (num_files - _OTHER_FILES) // 2))


class HttpConnections:
    """The listener and all its connections. `start` after the runner is set up."""

    def __init__(self, runner: web.AppRunner, limits: ConnectionLimits) -> None:
        self.is_leaving = False
        self._runner = runner
        self._limits = limits
        self._open: set[_Connection] = set()
        self._refusals: set[_Refusal] = set()
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.get_event_loop()
        runner.app.on_response_prepare.append(self._close_if_old)

    @property
    def num_open(self) -> int:
        """Connections that are served."""
        return len(self._open)

    async def start(self, host: str, port: int, *, reuse_port: bool) -> int:
        """Listen. Returns the port. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._listener = await self._loop.create_server(
            self._connect, host, port, backlog=_BACKLOG, reuse_port=reuse_port or None
        )
        return int(self._listener.sockets[0].getsockname()[1])

    def leave(self) -> None:
        """Take no new connections; those that are open close with their next answer."""
        self.is_leaving = True
        if self._listener is not None:
            self._listener.close()
        for refusal in list(self._refusals):
            refusal.close()

    def _connect(self) -> asyncio.Protocol:
        if len(self._open) >= self._limits.max_connections:
            return _Refusal(self._refusals, self._limits.max_connections)
        server = self._runner.server
        assert server is not None
        return _Connection(server, self._limits, self._open, self._loop)

    async def _close_if_old(self, request: web.Request, response: web.StreamResponse) -> None:
        connection = request.protocol
        if self.is_leaving or (isinstance(connection, _Connection) and connection.is_old()):
            response.headers["Connection"] = "close"
            response.force_close()


class _Connection(web.RequestHandler):
    """One client's."""

    __slots__ = ("_limits", "_old_at", "_open", "_stalled")

    def __init__(
        self,
        server: web.Server,
        limits: ConnectionLimits,
        connections: set[_Connection],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        no_log: Any = None
        super().__init__(server, loop=loop, access_log=no_log, keepalive_timeout=limits.idle_s)
        self._limits = limits
        self._open = connections
        # Spread, or all that came at once would go at once.
        self._old_at = loop.time() + limits.max_age_s * random.uniform(0.9, 1.1)
        self._stalled: asyncio.TimerHandle | None = None

    def is_old(self) -> bool:
        return bool(self._limits.max_age_s) and self._loop.time() >= self._old_at

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._open.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._open.discard(self)
        self._go_on()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._go_on()
        self._stalled = self._loop.call_later(self._limits.read_timeout_s, self._cut)

    def resume_writing(self) -> None:
        self._go_on()
        super().resume_writing()

    def _go_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _cut(self) -> None:
        self._stalled = None
        if self.transport is not None:
            log.warning(
                "a connection is cut: its client has left %d bytes unread for %g s",
                self.transport.get_write_buffer_size(),
                self._limits.read_timeout_s,
            )
            self.transport.abort()


class _Refusal(asyncio.Protocol):
    """A connection too many: told so when it asks for something, and closed."""

    def __init__(self, refusals: set[_Refusal], limit: int) -> None:
        self._refusals = refusals
        self._limit = limit
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if len(self._refusals) >= _MAX_REFUSALS:
            self._transport.abort()
            return
        if not self._refusals:
            log.warning("connections are refused: %d are open already", self._limit)
        self._refusals.add(self)
        self._timer = asyncio.get_running_loop().call_later(_REFUSAL_S, self.close)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        problem = Problem(
            503,
            f"{self._limit} connections are open here already: try again later",
            type="service_unavailable_error",
            code="too_many_connections",
        )
        body = error_body(problem)
        self._transport.write(
            b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        # What else was sent is read for a moment: closing over it would take the answer back.
        self._transport.write_eof()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._refusals.discard(self)
        if self._timer is not None:
            self._timer.cancel()


def body_in_time(timeout_s: float) -> Middleware:
    """A middleware: a body that takes longer is answered with 408, and its connection closed."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        content: Any = request.content
        if content.is_eof():
            return await handler(request)

        def too_slow() -> None:
            if not content.is_eof():
                problem = Problem(
                    408, f"the body took longer than {timeout_s:g} s", code="body_too_slow"
                )
                content.set_exception(HttpError(problem, close=True))

        timer = asyncio.get_running_loop().call_later(timeout_s, too_slow)
        try:
            return await handler(request)
        finally:
            timer.cancel()

    return middleware
