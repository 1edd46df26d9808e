"""One client's HTTP/2 connection: frames in, calls fed; flow control; its age and its end.

    greeting ── preface ──> open ── told to leave ──> draining ── last call ends ──> closed
        └── not in time ──────┴── fault, silence ───────┴── grace over ──────────────> closed

It serves gRPC calls only, pushes nothing and keeps no priorities. What a client
may make us hold is bounded: calls at once, unread bytes, headers, unread answers;
a client that breaks the protocol loses its connection, with a reason.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol, cast

from headrace.errors import HeadraceError, ResourceExhausted
from services.gateway.h2 import wire
from services.gateway.h2.call import STREAM_WINDOW, ServerCall
from services.gateway.h2.headers import MAX_HEADERS_LEN, HeaderReader, Headers
from services.gateway.h2.wire import ConnectionFault, StreamFault

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("headrace.gateway.grpc")

#: What all streams of a connection together may send us unasked.
CONNECTION_WINDOW = 4 << 20
MAX_STREAMS = 2048
#: Answers written but not taken by the client's kernel, from which on calls wait.
_PAUSE_LEN = 256 << 10
#: The same, from which on a client is taken for one that only sends.
_MAX_UNREAD_LEN = 4 << 20
#: Frames that ask for an answer or for nothing, in one tick.
_MAX_CONTROL_FRAMES = 20_000
#: Silence, age and faults are looked at this often.
TICK_S = 10.0
_PING, _DRAIN_PING = b"headrace", b"draining"


class Host(Protocol):
    """What a connection wants of its server."""

    #: Bytes of incomplete messages, over all connections.
    held_len: int

    def start_call(self, call: ServerCall) -> None:
        """A call came; its requests follow."""

    def refusal(self) -> HeadraceError | None:
        """Why no further call can be served now, if so."""

    def closed(self, connection: Connection) -> None:
        """The connection is gone."""

    def may_hold(self, num_bytes: int) -> bool:
        """Whether so many bytes more of incomplete messages fit."""


class Connection(asyncio.Protocol):
    """Made by the server for each client. `max_age_s` 0 means for ever."""

    def __init__(self, host: Host, *, max_age_s: float, age_grace_s: float) -> None:
        self.send_window = wire.DEFAULT_WINDOW
        self.is_paused = False
        self.peer = ""
        self.write: Callable[[bytes], None] = _nowhere
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._age_left_s = max_age_s or float("inf")
        self._age_grace_s = age_grace_s
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._greeted = False
        self._headers = HeaderReader()
        self._calls: dict[int, ServerCall] = {}
        self._blocked: dict[int, ServerCall] = {}
        self._stuck: set[int] = set()
        self._last_id = 0
        self._peer_stream_window = wire.DEFAULT_WINDOW
        self._recv_window = CONNECTION_WINDOW
        self._owed = 0
        self._num_control = 0
        self._heard = True
        self._ping_open = False
        self._is_leaving = False
        self._refuses_new = False
        self._grace: asyncio.TimerHandle | None = None
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        self._handlers = {
            wire.DATA: self._on_data,
            wire.HEADERS: self._on_headers,
            wire.PRIORITY: self._on_priority,
            wire.RST_STREAM: self._on_reset,
            wire.SETTINGS: self._on_settings,
            wire.PUSH_PROMISE: self._on_misplaced,
            wire.PING: self._on_ping,
            wire.GOAWAY: self._on_goaway,
            wire.WINDOW_UPDATE: self._on_window_update,
            wire.CONTINUATION: self._on_misplaced,
        }

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_PAUSE_LEN)
        name = transport.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "unix:"
        self.write = self._transport.write
        settings = {
            wire.MAX_CONCURRENT_STREAMS_ID: MAX_STREAMS,
            wire.INITIAL_WINDOW_SIZE_ID: STREAM_WINDOW,
            wire.MAX_HEADER_LIST_SIZE_ID: MAX_HEADERS_LEN,
        }
        more = CONNECTION_WINDOW - wire.DEFAULT_WINDOW
        self.write(wire.settings(settings) + wire.window_update(0, more))

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        for call in list(self._calls.values()):
            call.on_reset()
        self._host.closed(self)

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False
        self._unblock()

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        self._heard = True
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            if not self._greeted:
                if not self._greet(buffer):
                    return
                at = len(wire.PREFACE)
            at = self._read_frames(buffer, at)
        except ConnectionFault as fault:
            self._die(fault)
        del buffer[:at]

    def _greet(self, buffer: bytearray) -> bool:
        start = bytes(buffer[: len(wire.PREFACE)])
        if not wire.PREFACE.startswith(start):
            raise ConnectionFault(wire.PROTOCOL_ERROR, "this port speaks HTTP/2 (gRPC) only")
        self._greeted = len(start) == len(wire.PREFACE)
        return self._greeted

    def _read_frames(self, buffer: bytearray, at: int) -> int:
        """Handle all whole frames from `at` on; returns where the rest begins."""
        size = len(buffer)
        while size - at >= wire.HEAD_LEN:
            length = int.from_bytes(buffer[at : at + 3], "big")
            if length > wire.MAX_FRAME_LEN:
                raise ConnectionFault(wire.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            end = at + wire.HEAD_LEN + length
            if end > size:
                break
            kind, flags = buffer[at + 3], buffer[at + 4]
            stream_id = int.from_bytes(buffer[at + 5 : at + 9], "big") & wire.MAX_WINDOW
            payload = bytes(buffer[at + wire.HEAD_LEN : end])
            at = end
            if self._headers.is_open:
                self._on_continuation(kind, flags, stream_id, payload)
            elif (handler := self._handlers.get(kind)) is not None:
                try:
                    handler(flags, stream_id, payload)
                except StreamFault as fault:
                    self._reset(stream_id, fault.code)
            if self._transport is None:
                break
        return at

    # What frames say.

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        length = len(payload)
        self._recv_window -= length
        if self._recv_window < 0:
            raise ConnectionFault(wire.FLOW_CONTROL_ERROR, "more data than the window lets through")
        self._owed += length
        if self._owed > CONNECTION_WINDOW // 2:
            self.write(wire.window_update(0, self._owed))
            self._recv_window += self._owed
            self._owed = 0
        call = self._calls.get(stream_id)
        if call is None:
            if stream_id == 0 or stream_id > self._last_id:
                raise ConnectionFault(wire.PROTOCOL_ERROR, "data for a stream that is not open")
            return
        if not length and not flags & wire.END_STREAM:
            self._control()
        try:
            call.receive(wire.unpadded(flags, payload), length)
            if not self._host.may_hold(call.held_len - call.counted_len):
                text = "too many long messages arrive at once"
                raise ResourceExhausted(text, retry_after_ms=1000)
        except HeadraceError as error:
            self._fail(call, error)
            return
        self._count(call, call.held_len)
        if flags & wire.END_STREAM:
            call.end_requests()

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        headers = self._headers.begin(flags, stream_id, payload)
        if headers is not None:
            self._on_block(headers)

    def _on_continuation(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        headers = self._headers.go_on(kind, flags, stream_id, payload)
        self._control()
        if headers is not None:
            try:
                self._on_block(headers)
            except StreamFault as fault:
                self._reset(stream_id, fault.code)

    def _on_block(self, headers: Headers) -> None:
        stream_id = headers.stream_id
        call = self._calls.get(stream_id)
        if call is not None:
            # Trailers: gRPC gives a client's no meaning.
            if call.requests_ended or not headers.is_last:
                raise StreamFault(wire.PROTOCOL_ERROR)
            call.end_requests()
            return
        if stream_id <= self._last_id:
            raise ConnectionFault(wire.STREAM_CLOSED, "headers on a stream that is over")
        self._last_id = stream_id
        if self._refuses_new or len(self._calls) >= MAX_STREAMS:
            raise StreamFault(wire.REFUSED_STREAM)
        self._open(headers)

    def _open(self, headers: Headers) -> None:
        stream_id, is_last, fields = headers
        refusal: HeadraceError | None = None
        try:
            head = wire.read_head(fields)
        except HeadraceError as error:
            head, refusal = wire.CallHead("", (), None, "identity"), error
        if isinstance(head, wire.NotGrpc):
            block = wire.http_status_block(head.status, head.text)
            self.write(wire.headers(wire.END_HEADERS | wire.END_STREAM, stream_id, block))
            self.write(wire.reset(stream_id, wire.NO_ERROR) if not is_last else b"")
            return
        call = ServerCall(self, stream_id, head, self._peer_stream_window)
        self._calls[stream_id] = call
        if is_last:
            call.end_requests()
        refusal = refusal or self._host.refusal()
        if refusal is not None:
            call.fail(refusal)
        else:
            self._host.start_call(call)

    def _on_reset(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(wire.FRAME_SIZE_ERROR, "a RST_STREAM frame of a wrong length")
        if stream_id == 0 or stream_id > self._last_id:
            raise ConnectionFault(wire.PROTOCOL_ERROR, "a reset of a stream that is not open")
        self._control()
        if stream_id in self._calls:
            self._calls[stream_id].on_reset()

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(wire.PROTOCOL_ERROR, "settings of a stream")
        if flags & wire.ACK:
            return
        self._control()
        settings = wire.read_settings(payload)
        window = settings.get(wire.INITIAL_WINDOW_SIZE_ID, self._peer_stream_window)
        if window > wire.MAX_WINDOW:
            raise ConnectionFault(wire.FLOW_CONTROL_ERROR, f"an initial window of {window}")
        change, self._peer_stream_window = window - self._peer_stream_window, window
        self.write(wire.frame(wire.SETTINGS, wire.ACK, 0))
        if change:
            for call in list(self._calls.values()):
                call.on_window(change)

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 8 or stream_id:
            raise ConnectionFault(wire.FRAME_SIZE_ERROR, "a PING frame of a wrong form")
        if not flags & wire.ACK:
            self._control()
            self.write(wire.frame(wire.PING, wire.ACK, 0, payload))
            return
        self._ping_open = False
        if payload == _DRAIN_PING and self._is_leaving:
            self._refuse_new()

    def _on_window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(wire.FRAME_SIZE_ERROR, "a WINDOW_UPDATE frame of a wrong length")
        increment = int.from_bytes(payload, "big") & wire.MAX_WINDOW
        if stream_id:
            if stream_id > self._last_id:
                raise ConnectionFault(wire.PROTOCOL_ERROR, "a window of a stream that is not open")
            if not increment:
                raise StreamFault(wire.PROTOCOL_ERROR)
            call = self._calls.get(stream_id)
            if call is not None:
                call.on_window(increment)
            return
        self.send_window += increment
        if not increment or self.send_window > wire.MAX_WINDOW:
            raise ConnectionFault(wire.FLOW_CONTROL_ERROR, "a wrong window")
        self._unblock()

    def _on_priority(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 5 or not stream_id:
            raise ConnectionFault(wire.FRAME_SIZE_ERROR, "a PRIORITY frame of a wrong form")
        self._control()

    def _on_goaway(self, flags: int, stream_id: int, payload: bytes) -> None:
        """The client will open no more calls; those that run go on."""

    def _on_misplaced(self, flags: int, stream_id: int, payload: bytes) -> None:
        raise ConnectionFault(wire.PROTOCOL_ERROR, "a frame that does not belong here")

    # What calls say.

    def block(self, call: ServerCall) -> None:
        """`call` waits for room: its `flush` is called when there is some."""
        self._blocked[call.stream_id] = call

    def forget(self, call: ServerCall) -> None:
        """`call` is over."""
        if self._calls.pop(call.stream_id, None) is None:
            return
        self._count(call, 0)
        self._blocked.pop(call.stream_id, None)
        if self._is_leaving and not self._calls:
            self._close_soon()

    def _count(self, call: ServerCall, held_len: int) -> None:
        self._host.held_len += held_len - call.counted_len
        call.counted_len = held_len

    def _unblock(self) -> None:
        if self._blocked:
            blocked, self._blocked = self._blocked, {}
            for call in blocked.values():
                call.flush()

    def _fail(self, call: ServerCall, error: HeadraceError) -> None:
        call.fail(error)
        if call.task is not None:
            call.task.cancel()

    def _reset(self, stream_id: int, code: int) -> None:
        self.write(wire.reset(stream_id, code))
        if stream_id in self._calls:
            self._calls[stream_id].on_reset()

    # How it ends.

    def leave(self, grace_s: float) -> None:
        """Take no new calls, let those that run end within `grace_s`, and close."""
        if self._is_leaving or self._transport is None:
            return
        self._is_leaving = True
        self._grace = self._loop.call_later(grace_s, self.abort)
        if not self._greeted:
            self.abort()
            return
        # Calls on their way to us still count: only the answered ping ends that.
        self.write(wire.goaway(wire.MAX_WINDOW, wire.NO_ERROR, "draining"))
        self.write(wire.frame(wire.PING, 0, 0, _DRAIN_PING))

    def _refuse_new(self) -> None:
        self._refuses_new = True
        self.write(wire.goaway(self._last_id, wire.NO_ERROR, "draining"))
        if not self._calls:
            self._close_soon()

    def _close_soon(self) -> None:
        if self._refuses_new and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once; the calls' handlers are cancelled."""
        if self._transport is not None:
            self._transport.abort()

    def _die(self, fault: ConnectionFault) -> None:
        log.info("%s loses its connection: %s", self.peer, fault)
        self.write(wire.goaway(self._last_id, fault.code, str(fault)))
        if self._transport is not None:
            self._transport.close()
        self._stop()

    def _stop(self) -> None:
        self._transport = None
        self.write = _nowhere
        self._buffer = bytearray()
        self._ticker.cancel()
        if self._grace is not None:
            self._grace.cancel()

    def _control(self) -> None:
        self._num_control += 1
        if self._num_control > _MAX_CONTROL_FRAMES:
            raise ConnectionFault(wire.ENHANCE_YOUR_CALM, "too many control frames")
        transport = self._transport
        if transport is not None and transport.get_write_buffer_size() > _MAX_UNREAD_LEN:
            self.abort()

    def _tick(self) -> None:
        if not self._greeted or self._headers.is_open:
            self.abort()
            return
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        self._num_control = 0
        self._age_left_s -= TICK_S
        if self._age_left_s <= 0:
            self.leave(self._age_grace_s)
        self._drop_stuck()
        if self._calls and not self._heard:
            if self._ping_open:
                self.abort()
                return
            self._ping_open = True
            self.write(wire.frame(wire.PING, 0, 0, _PING))
        self._heard = False

    def _drop_stuck(self) -> None:
        """Calls whose client did not take their end since the last time."""
        stuck = {call.stream_id for call in self._calls.values() if call.is_stuck}
        for stream_id in stuck & self._stuck:
            self._reset(stream_id, wire.CANCEL)
        self._stuck = stuck


def _nowhere(data: bytes) -> None:
    """Where bytes go when the connection is gone."""
