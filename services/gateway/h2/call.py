"""One RPC on the server: messages in, messages out, a status at the end.

Handlers get it as their context, in place of a `grpc.aio.ServicerContext`, whose
methods it has as far as servicers use them. `send` is the fast path: it writes a
message straight into the connection's buffer, with no task switch. What the
client's flow control does not let through waits here, and `on_drained` is called
when nothing waits any more; whoever sends asks `is_blocked` first, for nothing
else bounds what waits.

It knows no frames but those that carry its messages, and no handler.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from headrace.rpc import errors
from headrace.rpc.options import MAX_MESSAGE_LEN
from services.gateway.h2 import wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from headrace.errors import HeadraceError
    from services.gateway.h2.connection import Connection

    Metadata = Iterable[tuple[str, str | bytes]]

#: What a stream may send us unasked; more is granted as it is read.
STREAM_WINDOW = 1 << 20
_PREFIX_LEN = 5
#: The pipeline's own deadline says more than ours: it goes first.
_DEADLINE_SLACK_S = 0.1


class AbortedError(Exception):
    """The handler ended its call with a status."""


class ServerCall:
    """One call. All methods are for the event loop."""

    def __init__(
        self, connection: Connection, stream_id: int, head: wire.CallHead, send_window: int
    ) -> None:
        self.stream_id = stream_id
        self.head = head
        self.send_window = send_window
        #: Bytes that the server counts as held for this call.
        self.counted_len = 0
        #: Called when nothing waits to be sent any more.
        self.on_drained: Callable[[], None] | None = None
        #: Called when there is a message to read, or never will be another.
        self.on_request: Callable[[], None] | None = None
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._recv_window = STREAM_WINDOW
        self._owed = 0
        self._partial = bytearray()
        self._messages: deque[bytes] = deque()
        self._requests_ended = False
        self._reader: asyncio.Future[None] | None = None
        self._has_head = False
        self._out = bytearray()
        #: Whether somebody was told to wait.
        self._made_wait = False
        self._status: bytes | None = None
        self._writers: list[asyncio.Future[None]] = []
        self._is_over = False
        self._code = grpc.StatusCode.OK
        self._details = ""
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()
        self._callbacks: list[Callable[[Any], None]] = []
        if head.timeout_s is not None:
            self._deadline = self._loop.time() + head.timeout_s
            self._timer = self._loop.call_at(self._deadline + _DEADLINE_SLACK_S, self._expire)

    # In: what the connection says.

    @property
    def held_len(self) -> int:
        """Bytes of a message that is not complete."""
        return len(self._partial)

    @property
    def requests_ended(self) -> bool:
        return self._requests_ended

    def receive(self, data: bytes, frame_len: int) -> None:
        """The next of the client's bytes, from a frame that long.

        Raises StreamFault, or a HeadraceError that ends the call."""
        self._recv_window -= frame_len
        self._owed += frame_len
        if self._recv_window < 0:
            raise wire.StreamFault(wire.FLOW_CONTROL_ERROR)
        if self._requests_ended:
            raise wire.StreamFault(wire.STREAM_CLOSED)
        self._partial += data
        while len(self._partial) >= _PREFIX_LEN:
            length = int.from_bytes(self._partial[1:_PREFIX_LEN], "big")
            if length > MAX_MESSAGE_LEN:
                raise wire.too_long(MAX_MESSAGE_LEN)
            end = _PREFIX_LEN + length
            if len(self._partial) < end:
                break
            message = bytes(self._partial[_PREFIX_LEN:end])
            if self._partial[0]:
                message = wire.decompress(message, self.head.encoding, MAX_MESSAGE_LEN)
            del self._partial[:end]
            self._messages.append(message)
        self._grant()
        if self._messages:
            self._wake_reader()

    def end_requests(self) -> None:
        self._requests_ended = True
        self._wake_reader()

    def on_reset(self) -> None:
        """The client gave up, or its connection is gone."""
        self._finish()
        if self.task is not None:
            self.task.cancel()

    def on_window(self, increment: int) -> None:
        self.send_window += increment
        if self.send_window > wire.MAX_WINDOW:
            raise wire.StreamFault(wire.FLOW_CONTROL_ERROR)
        if increment > 0:
            self.flush()

    def _grant(self) -> None:
        if self._owed > STREAM_WINDOW // 2 and not self._messages:
            self._connection.write(wire.window_update(self.stream_id, self._owed))
            self._recv_window += self._owed
            self._owed = 0

    def _wake_reader(self) -> None:
        if self.on_request is not None:
            self.on_request()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next_message(self) -> bytes | None:
        """The next message's bytes; None when the client has said all. For one reader."""
        while not self._messages and not self._requests_ended:
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if not self._messages:
            return None
        message = self._messages.popleft()
        self._grant()
        return message

    async def messages(self, parse: Callable[[bytes], Any]) -> AsyncIterator[Any]:
        """All messages, parsed."""
        while (data := await self.next_message()) is not None:
            yield parse(data)

    # Out.

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def is_stuck(self) -> bool:
        """Whether all is said, but the client does not take it."""
        return self._status is not None and not self._is_over

    @property
    def is_blocked(self) -> bool:
        """Whether what is sent now would wait."""
        return bool(self._out) or self._connection.is_paused

    def send(self, message: bytes) -> None:
        """Send one serialized message, now if the client's window lets it through."""
        length = len(message)
        size = _PREFIX_LEN + length
        connection = self._connection
        if (
            not self._has_head
            or self._out
            or size > self.send_window
            or size > connection.send_window
            or size > wire.MAX_FRAME_LEN
            or connection.is_paused
        ):
            self._queue(message)
            return
        self.send_window -= size
        connection.send_window -= size
        connection.write(
            wire.MESSAGE_HEAD.pack(0, size, wire.DATA, self.stream_id, 0, length) + message
        )

    def _queue(self, message: bytes) -> None:
        if self._is_over or self._status is not None:
            return
        self.send_head()
        self._out += b"\0" + len(message).to_bytes(4, "big")
        self._out += message
        self.flush()

    def send_head(self, metadata: Metadata = ()) -> None:
        """The answer's headers, once."""
        if self._has_head or self._is_over:
            return
        self._has_head = True
        pairs = [(key, value if isinstance(value, str) else value.decode("latin-1"))
                 for key, value in metadata]  # fmt: skip
        block = wire.RESPONSE_HEAD + wire.header_block(pairs)
        self._connection.write(wire.frame(wire.HEADERS, wire.END_HEADERS, self.stream_id, block))

    def finish(self, code: int, message: str = "", metadata: Metadata = ()) -> None:
        """End the call, after all that waits. The first status counts."""
        if self._is_over or self._status is not None:
            return
        block = wire.status_block(code, errors.short(message), metadata)
        self._status = block if self._has_head else wire.RESPONSE_HEAD + block
        self.flush()

    def fail(self, error: HeadraceError) -> None:
        """End the call with an error, after all that waits."""
        code = errors.rich_status(error).code
        self.finish(code, error.message, errors.trailers(error))

    def flush(self) -> None:
        """Write what waits, as far as the client's windows go."""
        if self._is_over:
            return
        out, connection = self._out, self._connection
        while out:
            room = min(self.send_window, connection.send_window, wire.MAX_FRAME_LEN)
            if room <= 0 or connection.is_paused:
                self.wait_for_room()
                return
            data = bytes(out[:room])
            del out[:room]
            self.send_window -= len(data)
            connection.send_window -= len(data)
            connection.write(wire.frame(wire.DATA, 0, self.stream_id, data))
        if self._status is not None:
            self._end(self._status)
            return
        if not self._made_wait:
            return
        if connection.is_paused:
            self.wait_for_room()
            return
        self._made_wait = False
        writers, self._writers = self._writers, []
        for writer in writers:
            if not writer.done():
                writer.set_result(None)
        if self.on_drained is not None:
            self.on_drained()

    async def drain(self) -> None:
        """Until nothing waits."""
        while self.is_blocked and not self._is_over:
            writer = self._loop.create_future()
            self._writers.append(writer)
            self.wait_for_room()
            await writer

    def wait_for_room(self) -> None:
        """Have `on_drained` called when the connection takes more."""
        self._made_wait = True
        self._connection.block(self)

    def _end(self, block: bytes) -> None:
        # What the client still says is dropped. It is not reset: a client in the middle of a
        # write could take that for the call's end, and not see the status.
        flags = wire.END_HEADERS | wire.END_STREAM
        self._connection.write(wire.headers(flags, self.stream_id, block))
        self._finish()

    def _finish(self) -> None:
        """Over: nothing is read or written any more."""
        if self._is_over:
            return
        self._is_over = True
        self._out.clear()
        self._partial.clear()
        self._requests_ended = True
        if self._timer is not None:
            self._timer.cancel()
        for writer in self._writers:
            if not writer.done():
                writer.set_result(None)
        self._connection.forget(self)
        for callback in self._callbacks:
            callback(self)

    def _expire(self) -> None:
        self.finish(grpc.StatusCode.DEADLINE_EXCEEDED.value[0], "the call's deadline passed")
        if self.task is not None:
            self.task.cancel()

    # What servicers know of grpc.aio.ServicerContext.

    async def write(self, message: Any) -> None:
        """Send a message of the method's response type; waits while the client's window is full."""
        self.send(self.serialize(message))
        if self.is_blocked:
            await self.drain()

    #: The method's response serializer, set by the server.
    serialize: Callable[[Any], bytes]

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()
    ) -> NoReturn:
        """End the call. Raises, always."""
        self.finish(code.value[0], details, (*self._trailing, *trailing_metadata))
        raise AbortedError(details)

    def succeed(self) -> None:
        """End the call with what the handler set, OK if nothing."""
        self.finish(self._code.value[0], self._details, self._trailing)

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.head.metadata

    def time_remaining(self) -> float | None:
        """Seconds that the client's deadline leaves, not below 0; None: it has none."""
        return None if self._deadline is None else max(0.0, self._deadline - self._loop.time())

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        self.send_head(metadata)

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._trailing = tuple(metadata)

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def peer(self) -> str:
        return self._connection.peer

    def cancelled(self) -> bool:
        return self._is_over and self._status is None

    def done(self) -> bool:
        return self._is_over

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)
