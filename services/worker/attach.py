"""The connections of sessions: one `Attach` call each, and what remains without one.

A session has one connection at most; a newer one replaces it. A session without
one waits for the grace and then closes.

Of grpc.aio (measured): a client that died looks like a clean half-close; a
handler that is a generator and is cancelled while it writes only ends when it is
collected. So `Connection.close` is called from the RPC's done callback too, and
may be called any number of times.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from headrace.errors import InvalidArgument, ResourceExhausted
from headrace.v1 import worker_pb2
from services.worker import convert
from services.worker.sessions import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.worker.convert import Identity, Pulse
    from services.worker.dispatch import Sequences

#: A session id and a gateway id are no longer than this.
MAX_ID_LEN = 128
MAX_SESSIONS = 1024

log = logging.getLogger("headrace.worker")


class Host(Protocol):
    """What a stream tells of the worker."""

    def identity(self) -> Identity:
        """Who it is, now."""

    def pulse(self) -> Pulse:
        """What its engine does."""


class Sessions:
    """All sessions of one worker."""

    def __init__(
        self,
        sequences: Sequences,
        grace_s: float,
        host: Host,
    ) -> None:
        self.host = host
        self._sequences = sequences
        self._grace_s = grace_s
        self._sessions: dict[str, Session] = {}
        self._connections: dict[Session, Connection] = {}
        self._graces: dict[Session, asyncio.TimerHandle] = {}

    @property
    def are_idle(self) -> bool:
        """Whether every gateway has everything and wants nothing."""
        return all(session.is_idle for session in self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)

    def beat(self) -> None:
        """Send a heartbeat on every connection."""
        for connection in self._connections.values():
            connection.beat()

    def close(self) -> None:
        """End all streams and sessions."""
        for session in list(self._sessions.values()):
            self.remove(session)

    def open(self, opening: worker_pb2.AttachOpen, connection: Connection) -> tuple[Session, bool]:
        """The session that `connection` is for, and whether it goes on.

        Raises InvalidArgument, ResourceExhausted.
        """
        for field, value in (
            ("session_id", opening.session_id),
            ("gateway_id", opening.gateway_id),
        ):
            if not 0 < len(value) <= MAX_ID_LEN:
                raise InvalidArgument(
                    f"{field} must have 1 to {MAX_ID_LEN} characters, not {len(value)}",
                    field=field,
                )
        session = self._sessions.get(opening.session_id)
        if session is not None and not opening.resume:
            # Its gateway doesn't know it: it began again under the same id.
            self.remove(session)
            session = None
        resumed = session is not None
        if session is None:
            if len(self._sessions) >= MAX_SESSIONS:
                raise ResourceExhausted(f"{len(self._sessions)} sessions are open already")
            session = Session(opening.session_id, opening.gateway_id, self._sequences)
            self._sessions[session.session_id] = session
        older = self._connections.pop(session, None)
        if older is not None:
            older.close()
        grace = self._graces.pop(session, None)
        if grace is not None:
            grace.cancel()
        self._connections[session] = connection
        session.wake = connection.wake
        return session, resumed

    def detach(self, session: Session, connection: Connection) -> None:
        """`connection` is over: its session waits for another."""
        if self._connections.get(session) is not connection:
            return
        del self._connections[session]
        session.wake = _nobody
        self._graces[session] = asyncio.get_running_loop().call_later(
            self._grace_s, self.remove, session
        )

    def remove(self, session: Session) -> None:
        """Close a session: what runs in it is stopped."""
        if self._sessions.get(session.session_id) is not session:
            return
        del self._sessions[session.session_id]
        if session.has_output:
            log.warning("session %s of gateway %s is over", session.session_id, session.gateway_id)
        session.close()
        session.wake = _nobody
        grace = self._graces.pop(session, None)
        if grace is not None:
            grace.cancel()
        connection = self._connections.pop(session, None)
        if connection is not None:
            connection.close()


class Connection:
    """One `Attach` call. The handler yields what `frames` gives, and nothing else writes."""

    def __init__(
        self, sessions: Sessions, requests: AsyncIterator[worker_pb2.AttachRequest]
    ) -> None:
        self._sessions = sessions
        self._requests = requests
        self._session: Session | None = None
        self._reader: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._beat_due = False
        self._half_closed = False
        self._closed = False
        self._error: Exception | None = None

    def wake(self) -> None:
        """There is something to send."""
        self._woken.set()

    def beat(self) -> None:
        """A heartbeat is due."""
        self._beat_due = True
        self._woken.set()

    def close(self) -> None:
        """The stream is over, or shall be. Its session goes on without it."""
        self._closed = True
        self._woken.set()
        if self._reader is not None:
            self._reader.cancel()
        if self._session is not None:
            self._sessions.detach(self._session, self)

    async def frames(self) -> AsyncIterator[worker_pb2.AttachResponse]:
        """All that this stream sends. Raises HeadraceError for the caller to abort with."""
        try:
            first = await anext(aiter(self._requests), None)
            if first is None or self._closed:
                return
            if not first.HasField("open"):
                raise InvalidArgument("the first frame of a connection must open a session")
            session, resumed = self._sessions.open(first.open, self)
            self._session = session
            if resumed or not first.open.resume:
                # Else its numbers belong to a session that is gone.
                session.receive(first)
            yield session.unnumbered(
                opened=worker_pb2.AttachOpened(
                    worker=convert.worker_ref(self._sessions.host.identity()), resumed=resumed
                )
            )
            for frame in session.unacknowledged():
                yield frame
            self._reader = asyncio.create_task(self._read(session), name="attach reader")
            self._woken.set()
            while not self._closed:
                await self._woken.wait()
                self._woken.clear()
                while not self._closed and (next_frame := self._next(session)) is not None:
                    yield next_frame
                if self._error is not None:
                    raise self._error
                if self._half_closed and not session.has_output:
                    return
        finally:
            self.close()

    def _next(self, session: Session) -> worker_pb2.AttachResponse | None:
        if session.broken is not None:
            self._sessions.remove(session)
            raise session.broken
        if self._beat_due:
            self._beat_due = False
            return session.unnumbered(heartbeat=convert.heartbeat(self._sessions.host.pulse()))
        return session.next_frame() or session.acknowledgement()

    async def _read(self, session: Session) -> None:
        try:
            async for request in self._requests:
                if self._closed:
                    return
                session.receive(request)
            self._half_closed = True
        except Exception as error:  # noqa: BLE001 - the writer raises it to the transport
            self._error = error
        finally:
            self._woken.set()


def _nobody() -> None:
    """There is no connection."""
