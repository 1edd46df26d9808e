"""Many calls on one bidirectional stream: the form of the tokenizer's and router's hops.

`CallClient` keeps one stream to one peer open, writes what waits in merged
frames, and resolves each call's future when its answer comes. When the stream
breaks it reconnects and sends the unanswered calls again, so calls must be safe
to repeat. `CallServer` is the other end. Both learn a hop's message types from
a codec, and carry no meaning of their own.

Per call there is one future on the client; the server makes a task only where
the answer is not there at once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError

from headrace.errors import (
    DeadlineExceeded,
    HeadraceError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from headrace.rpc.errors import from_exception, from_proto, to_proto
from headrace.rpc.frames import Assembler, Outbox
from headrace.service import cancel_and_wait

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from google.protobuf.message import Message

    from headrace.v1 import types_pb2

log = logging.getLogger("headrace.rpc")

Request = TypeVar("Request", bound="Message")
Response = TypeVar("Response", bound="Message")
Call = TypeVar("Call", bound="Message")
Result = TypeVar("Result", bound="Message")

#: Bytes that may wait for one stream, in either direction.
MAX_WAITING_LEN = 64 << 20
#: A call that was on the stream at this many breaks is not sent again: it may be the cause.
MAX_SENDS = 3
_RECONNECT_S = 0.2


class ClientCodec(ABC, Generic[Request, Response, Call, Result]):
    """How a client's frames are made and read. May merge messages of its own into them."""

    @abstractmethod
    def open(self) -> Request | None:
        """What goes first on a new connection."""

    @abstractmethod
    def has_more(self) -> bool:
        """Whether messages beside calls wait."""

    @abstractmethod
    def request(
        self, calls: list[Call], chunks: list[types_pb2.Chunk], cancels: list[int]
    ) -> Request:
        """The next frame."""

    @abstractmethod
    def results(self, response: Response) -> tuple[Iterable[Result], Sequence[types_pb2.Chunk]]:
        """What a frame holds."""

    @abstractmethod
    def parse_result(self, data: bytes) -> Result:
        """A result that came in chunks."""


class CallClient(Generic[Request, Response, Call, Result]):
    """One stream to one peer. `start` it inside the loop, `close` it at the end.

    `Call` and `Result` messages have an `id` field; a result's `error` field, if
    set, is raised from `call`.
    `on_lost` is called when a stream that stood has broken.
    """

    def __init__(
        self,
        peer: str,
        open_stream: Callable[[], grpc.aio.StreamStreamCall[Request, Response]],
        codec: ClientCodec[Request, Response, Call, Result],
        *,
        max_calls: int = 8192,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.peer = peer
        self.connected = False
        self._open_stream = open_stream
        self._codec = codec
        self._max_calls = max_calls
        self._on_lost = on_lost
        self._last_id = 0
        self._outbox: Outbox[Call] = Outbox(MAX_WAITING_LEN)
        self._cancels: list[int] = []
        self._waiting: dict[int, _Waiting[Call, Result]] = {}
        self._assembler = Assembler()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[object] | None = None
        #: Why the stream broke last, since the last answer: told once.
        self._problem = ""

    def start(self) -> None:
        """Connect, and stay connected."""
        self._task = asyncio.create_task(self._run(), name=f"calls to {self.peer}")

    async def close(self) -> None:
        """Disconnect; calls in flight fail with Unavailable."""
        await cancel_and_wait(self._task)
        for call_id in list(self._waiting):
            self._fail(call_id, Unavailable(f"the connection to {self.peer} was closed"))

    def next_id(self) -> int:
        """An id for a call; never given twice."""
        self._last_id += 1
        return self._last_id

    def wake(self) -> None:
        """The codec has something to send."""
        self._wake.set()

    async def call(
        self, call: Call, *, timeout_s: float, patience_s: float | None = None
    ) -> Result:
        """Send `call` (its id from `next_id`) and wait for its answer.

        Waits through reconnects. Raises the peer's error, ResourceExhausted when too
        many calls wait, and after `timeout_s` DeadlineExceeded with a TimeoutError as
        its cause (or Unavailable while disconnected). `patience_s` in all is what it
        may take instead once the peer has said that it works on it (`be_patient`).
        Cancelling it tells the peer.
        """
        if len(self._waiting) >= self._max_calls:
            raise ResourceExhausted(
                f"{len(self._waiting)} calls wait for {self.peer} already", retry_after_ms=200
            )
        loop = asyncio.get_running_loop()
        call_id: int = cast("Any", call).id
        self._outbox.push(call_id, call)
        waiting = _Waiting(call, loop.create_future(), timeout_s)
        if patience_s is not None:
            waiting.patient_until = loop.time() + patience_s
        self._waiting[call_id] = waiting
        self._wake.set()
        waiting.timer = loop.call_later(timeout_s, self._time_out, call_id, timeout_s)
        try:
            result: Result = await waiting.future
        except asyncio.CancelledError:
            self._withdraw(call_id)
            raise
        finally:
            waiting.timer.cancel()
            self._waiting.pop(call_id, None)
        return result

    def be_patient(self, call_id: int) -> None:
        """The peer works on the call and will answer late: it has its `patience_s`.

        Until the stream breaks: then it has its `timeout_s` again. Unknown ids are ignored.
        """
        waiting = self._waiting.get(call_id)
        if waiting is not None and waiting.timer is not None and waiting.patient_until:
            loop = asyncio.get_running_loop()
            left_s = max(0.0, waiting.patient_until - loop.time())
            waiting.timer.cancel()
            waiting.timer = loop.call_at(waiting.patient_until, self._time_out, call_id, left_s)
            waiting.is_patient = True

    def give_up(self) -> None:
        """Let every call in flight fail with Unavailable now, instead of sending it again."""
        for call_id in list(self._waiting):
            self._fail(call_id, Unavailable(f"{self.peer} was lost", retry_after_ms=500))

    def _time_out(self, call_id: int, timeout_s: float) -> None:
        error: HeadraceError
        if self.connected:
            error = DeadlineExceeded(f"{self.peer} did not answer within {timeout_s:.1f} s")
            error.__cause__ = TimeoutError()
        else:
            error = Unavailable(f"{self.peer} is not reachable", retry_after_ms=500)
        self._withdraw(call_id)
        self._fail(call_id, error)

    def _withdraw(self, call_id: int) -> None:
        if not self._outbox.discard(call_id) and self.connected:
            self._cancels.append(call_id)
            self._wake.set()

    def _fail(self, call_id: int, error: HeadraceError) -> None:
        waiting = self._waiting.pop(call_id, None)
        if waiting is not None and not waiting.future.done():
            waiting.future.set_exception(error)

    async def _run(self) -> None:
        while True:
            try:
                await self._converse()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                reason = _reason(error)
                if self.connected and reason != self._problem:
                    log.warning("%s: stream broke: %s", self.peer, reason)
                self._problem = reason
            except Exception:
                log.exception("%s: stream failed", self.peer)
            self.connected = False
            await asyncio.sleep(_RECONNECT_S)

    async def _converse(self) -> None:
        stream = self._open_stream()
        writer: asyncio.Task[object] | None = None
        try:
            await stream.wait_for_connection()
            self._repeat_unanswered()
            opening = self._codec.open()
            self.connected = True
            if opening is not None:
                await stream.write(opening)
            writer = asyncio.create_task(self._write(stream), name=f"writer to {self.peer}")
            while True:
                response = await stream.read()
                if response is grpc.aio.EOF:
                    return
                self._receive(cast("Response", response))
        finally:
            was_connected, self.connected = self.connected, False
            self._be_impatient()
            if was_connected and self._on_lost is not None:
                self._on_lost()
            await cancel_and_wait(writer)
            stream.cancel()

    def _be_impatient(self) -> None:
        """What the peer said of calls that it works on holds no longer than the stream."""
        loop = asyncio.get_running_loop()
        for call_id, waiting in self._waiting.items():
            if waiting.is_patient and waiting.timer is not None:
                waiting.is_patient = False
                waiting.timer.cancel()
                at = min(waiting.patient_until, loop.time() + waiting.timeout_s)
                waiting.timer = loop.call_at(at, self._time_out, call_id, waiting.timeout_s)

    def _repeat_unanswered(self) -> None:
        self._outbox.clear()
        self._cancels.clear()
        self._assembler = Assembler()
        for call_id, waiting in list(self._waiting.items()):
            if waiting.sends >= MAX_SENDS:
                self._fail(
                    call_id,
                    Unavailable(f"{self.peer} was lost {waiting.sends} times during this call"),
                )
                continue
            waiting.sends += 1
            self._outbox.push(call_id, waiting.call)
        self._wake.set()

    async def _write(self, stream: grpc.aio.StreamStreamCall[Request, Response]) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outbox or self._cancels or self._codec.has_more():
                messages, chunks = self._outbox.take()
                cancels, self._cancels = self._cancels, []
                await stream.write(self._codec.request(messages, chunks, cancels))

    def _receive(self, response: Response) -> None:
        self._problem = ""
        results, chunks = self._codec.results(response)
        for result in results:
            self._resolve(result)
        for chunk in chunks:
            data = self._assembler.add(chunk)
            if data is not None:
                self._resolve(self._codec.parse_result(data))

    def _resolve(self, result: Result) -> None:
        message = cast("Any", result)
        waiting = self._waiting.get(message.id)
        if waiting is None or waiting.future.done():
            return
        if message.HasField("error"):
            waiting.future.set_exception(from_proto(message.error))
        else:
            waiting.future.set_result(result)


class _Waiting(Generic[Call, Result]):
    __slots__ = ("call", "future", "is_patient", "patient_until", "sends", "timeout_s", "timer")

    def __init__(self, call: Call, future: asyncio.Future[Result], timeout_s: float) -> None:
        self.call = call
        self.future = future
        self.timeout_s = timeout_s
        self.timer: asyncio.TimerHandle | None = None
        self.sends = 0
        #: Until when it may take if the peer works on it, on the loop's clock; 0: no longer.
        self.patient_until = 0.0
        self.is_patient = False


class ServerCodec(ABC, Generic[Request, Response, Call, Result]):
    """How a server's frames are read and made."""

    @abstractmethod
    def calls(
        self, request: Request
    ) -> tuple[Iterable[Call], Sequence[types_pb2.Chunk], Sequence[int]]:
        """What a frame holds: calls, chunks of calls, cancels. May take more from it."""

    @abstractmethod
    def parse_call(self, data: bytes) -> Call:
        """A call that came in chunks."""

    @abstractmethod
    def has_more(self) -> bool:
        """Whether messages beside results wait."""

    @abstractmethod
    def response(self, results: list[Result], chunks: list[types_pb2.Chunk]) -> Response:
        """The next frame."""

    @abstractmethod
    def failure(self, call_id: int, error: types_pb2.Error) -> Result:
        """The result of a call that failed."""


class CallServer(Generic[Request, Response, Call, Result]):
    """The server's end of one stream.

    `dispatch(call)` returns the result, or an awaitable of it; what it raises
    becomes the call's error. Cancelled calls and those of a client that left are
    cancelled.
    """

    def __init__(
        self,
        codec: ServerCodec[Request, Response, Call, Result],
        dispatch: Callable[[Call], Result | Awaitable[Result]],
        *,
        max_calls: int = 8192,
    ) -> None:
        self._codec = codec
        self._dispatch = dispatch
        self._max_calls = max_calls
        self._outbox: Outbox[Result] = Outbox(MAX_WAITING_LEN)
        self._assembler = Assembler()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._over: BaseException | bool = False

    def wake(self) -> None:
        """The codec has something to send."""
        self._wake.set()

    async def frames(self, requests: AsyncIterator[Request]) -> AsyncIterator[Response]:
        """What to send, until the client is done or gone. The body of the RPC's handler."""
        reader: asyncio.Task[object] = asyncio.create_task(self._read(requests))
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._outbox or self._codec.has_more():
                    yield self._codec.response(*self._outbox.take())
                if isinstance(self._over, BaseException):
                    raise self._over
                if self._over and not self._tasks:
                    return
        finally:
            await cancel_and_wait(reader, *self._tasks.values())

    async def _read(self, requests: AsyncIterator[Request]) -> None:
        try:
            async for request in requests:
                calls, chunks, cancels = self._codec.calls(request)
                for call in calls:
                    self._start(call)
                for chunk in chunks:
                    data = self._assembler.add(chunk)
                    if data is not None:
                        self._start_parsed(chunk.id, data)
                for call_id in cancels:
                    self._assembler.discard(call_id)
                    if call_id in self._tasks:
                        self._tasks[call_id].cancel()
            self._over = True
        except Exception as error:  # noqa: BLE001 - the handler raises it to the transport
            self._over = error
        finally:
            self._wake.set()

    def _start_parsed(self, call_id: int, data: bytes) -> None:
        try:
            call = self._codec.parse_call(data)
        except DecodeError as error:
            # Its own fault alone: the stream and what else runs on it go on.
            failure = InvalidArgument(f"the call is malformed: {error}")
            self._reply(call_id, self._failure(call_id, failure))
            return
        self._start(call)

    def _start(self, call: Call) -> None:
        call_id: int = cast("Any", call).id
        try:
            if len(self._tasks) >= self._max_calls:
                raise ResourceExhausted(
                    f"{len(self._tasks)} calls run on this stream already", retry_after_ms=200
                )
            answer = self._dispatch(call)
        except Exception as error:  # noqa: BLE001 - becomes the call's error
            self._reply(call_id, self._failure(call_id, error))
            return
        if inspect.isawaitable(answer):
            task = asyncio.ensure_future(self._await(call_id, answer))
            self._tasks[call_id] = task
        else:
            self._reply(call_id, answer)

    async def _await(self, call_id: int, answer: Awaitable[Result]) -> None:
        try:
            self._reply(call_id, await answer)
        except Exception as error:  # noqa: BLE001 - becomes the call's error
            self._reply(call_id, self._failure(call_id, error))
        finally:
            self._tasks.pop(call_id, None)
            self._wake.set()

    def _failure(self, call_id: int, error: Exception) -> Result:
        return self._codec.failure(call_id, to_proto(from_exception(error)))

    def _reply(self, call_id: int, result: Result) -> None:
        try:
            self._outbox.push(call_id, result)
        except ResourceExhausted as error:
            self._over = error
        self._wake.set()


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details()}"
    return str(error) or type(error).__name__
