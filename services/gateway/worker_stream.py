"""One session with one worker: sequences out, one frame of tokens per engine step back.

    connecting ── opened ──> attached ── connection breaks ──> broken
        │                     │  ^                               │
        │ not in time         │  └──── re-attached in time ──────┤
        v                     v silent, or protocol error        v not in time, or unknown
      over                  over                               over

Frames both ways are numbered, acknowledged and kept until then, so that a new
connection of the same session neither loses nor repeats a token. Once a session
is over it stays so: all its sequences are lost, and go elsewhere.

Per frame the reader awaits once; no asyncio primitive is touched per token. It
knows neither text nor why a sequence goes to this worker.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import grpc

from headrace.errors import InvalidArgument, Unavailable
from headrace.rpc.errors import from_exception
from headrace.rpc.frames import FrameLog, FrameReceiver, Outbox
from headrace.rpc.options import FRAME_LEN
from headrace.service import cancel_and_wait
from headrace.v1 import worker_pb2 as pb
from services.gateway.fleet import Worker
from services.gateway.ids import new_session_id
from services.gateway.submission import End
from services.gateway.wire import end_of, submission_proto

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services.gateway.submission import Listener, Submission

    Call = grpc.aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse]

log = logging.getLogger("headrace.gateway")

#: Bytes of submissions that may wait for a worker, and that it may leave unacknowledged.
MAX_WAITING_LEN = 32 << 20
MAX_UNACKNOWLEDGED_LEN = 16 << 20
#: Acknowledge on a frame of its own after this many frames, or this long.
ACK_FRAMES = 32
ACK_S = 0.1
#: Silence and idleness are counted in ticks of this length, not read off a clock: a
#: gateway that was itself stopped for a while must not take all workers for dead.
TICK_S = 0.25
_RETRY_S = 0.05
_MAX_CANCELS = 2048
_UNKNOWN = object()
#: What a frame's submissions and chunks may take; cancels and framing need the rest.
_TAKE_LEN = FRAME_LEN - (12 << 10)

#: What reading and writing raise when a connection breaks.
BROKEN = (grpc.aio.AioRpcError, asyncio.InvalidStateError)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How patient a session is, in seconds."""

    connect_timeout_s: float = 3.0
    resume_window_s: float = 1.0
    heartbeat_timeout_s: float = 3.0
    idle_s: float = 60.0


class _OverError(Exception):
    """The session can't go on; the text says why, and `died` whether the process is gone."""

    def __init__(self, reason: str, *, died: bool = False) -> None:
        super().__init__(reason)
        self.died = died


class WorkerStream:
    """A session. It connects when made (inside the loop), and ends by itself when idle.

    `on_over(stream, reason, died)` is called once, after all sequences were told;
    `died` when the worker's process seems gone. `worker` is the one that answered,
    once it has.
    """

    def __init__(
        self,
        worker: Worker,
        open_stream: Callable[[], Call],
        *,
        gateway_id: str,
        limits: StreamLimits,
        on_over: Callable[[WorkerStream, str, bool], None],
    ) -> None:
        self.worker = worker
        self.is_over = False
        self._open_stream = open_stream
        self._gateway_id = gateway_id
        self._limits = limits
        self._on_over = on_over
        self._session_id = new_session_id()
        self._was_attached = False
        self._outbox: Outbox[pb.Submission] = Outbox(MAX_WAITING_LEN)
        self._cancels: list[int] = []
        #: Cancelled slots are not given out again: an end that crosses the cancel on
        #: the wire could otherwise be taken for the end of the slot's next sequence.
        self._cancelled: set[int] = set()
        self._sent: FrameLog[pb.AttachRequest] = FrameLog(MAX_UNACKNOWLEDGED_LEN)
        self._received = FrameReceiver()
        self._listeners: dict[int, Listener | None] = {}
        self._free_slots: list[int] = []
        self._next_slot = 1
        self._wake = asyncio.Event()
        self._unacknowledged = 0
        self._ack_timer: asyncio.TimerHandle | None = None
        self._ack_due = False
        self._call: Call | None = None
        self._verdict: _OverError | None = None
        self._silent_ticks = 0
        self._idle_ticks = 0
        self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self._task = asyncio.create_task(self._run(), name=f"session with {worker.worker_id}")

    @property
    def num_sequences(self) -> int:
        """Sequences that the worker has not ended yet, cancelled ones included."""
        return len(self._listeners)

    def submit(self, submission: Submission, listener: Listener) -> int:
        """Send a sequence; returns its slot. Raises Unavailable, or ResourceExhausted."""
        if self.is_over:
            raise Unavailable(f"the session with {self.worker.worker_id} is over")
        slot = self._free_slots[0] if self._free_slots else self._next_slot
        self._outbox.push(slot, submission_proto(submission, slot))
        if self._free_slots:
            heapq.heappop(self._free_slots)
        else:
            self._next_slot += 1
        self._listeners[slot] = listener
        self._idle_ticks = 0
        self._wake.set()
        return slot

    def cancel(self, slot: int, *, listen: bool = False) -> None:
        """Stop a sequence. Its listener hears nothing more, unless it wants to `listen`."""
        listener = self._listeners.get(slot)
        if listener is None or self.is_over:
            return
        if self._outbox.discard(slot):
            self._free(slot)
            return
        if not listen:
            self._listeners[slot] = None
        if slot not in self._cancelled:
            self._cancelled.add(slot)
            self._cancels.append(slot)
            self._wake.set()

    async def close(self) -> None:
        """End the session; sequences still on it are lost."""
        self.is_over = True
        self._judge(_OverError("its stream was closed"))
        await asyncio.gather(self._task, return_exceptions=True)

    # The session's life.

    async def _run(self) -> None:
        reason, died = "its session was given up", False
        window_s = self._limits.connect_timeout_s
        try:
            while True:
                call = await self._attach(window_s)
                broke = await self._converse(call)
                log.info("%s: connection broke: %s", self.worker.worker_id, broke)
                window_s = self._limits.resume_window_s
        except _OverError as error:
            reason, died = str(error), error.died
        except Exception:
            log.exception("%s: session failed", self.worker.worker_id)
            reason = "its session failed in the gateway"
        finally:
            self._end(reason, died)

    def _end(self, reason: str, died: bool) -> None:
        self.is_over = True
        self._ticker.cancel()
        self._acknowledged()
        self._outbox.clear()
        listeners, self._listeners = self._listeners, {}
        text = f"worker {self.worker.worker_id} was lost: {reason}"
        for slot, listener in listeners.items():
            if listener is not None:
                with self._guard(slot):
                    listener.on_lost(text, died=died and self._was_attached)
        self._on_over(self, reason, died)

    async def _attach(self, window_s: float) -> Call:
        """A connection of this session, in `window_s` or _OverError."""
        problem = "no answer"
        try:
            async with asyncio.timeout(window_s):
                while True:
                    self._check_verdict()
                    call = self._call = self._open_stream()
                    try:
                        await self._open(call)
                    except BaseException as error:
                        call.cancel()
                        self._check_verdict()
                        if not isinstance(error, BROKEN):
                            raise
                        problem = _reason(error)
                    else:
                        return call
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            doing = "re-attach" if self._was_attached else "connect"
            text = f"could not {doing} in {window_s:g} s: {problem}"
            raise _OverError(text, died=True) from None

    async def _open(self, call: Call) -> None:
        resume = self._was_attached
        opening = pb.AttachOpen(
            session_id=self._session_id, gateway_id=self._gateway_id, resume=resume
        )
        await call.write(pb.AttachRequest(ack=self._received.last, open=opening))
        response = await call.read()
        self._check_verdict()
        if response is grpc.aio.EOF:
            raise asyncio.InvalidStateError("the worker ended the stream")
        frame = cast("pb.AttachResponse", response)
        opened = frame.opened
        answering = Worker(opened.worker.worker_id, opened.worker.generation, self.worker.address)
        if answering.worker_id != self.worker.worker_id:
            raise _OverError(f"{answering.worker_id!r} answers at {answering.address}", died=True)
        if resume and not opened.resumed:
            restarted = answering.generation != self.worker.generation
            raise _OverError("it does not know the session any more", died=restarted)
        self.worker = answering
        self._was_attached = True
        self._receive(frame)

    async def _converse(self, call: Call) -> str:
        """Read frames until the connection breaks; returns why. Raises _OverError."""
        writer: asyncio.Task[object] = asyncio.create_task(self._write(call))
        self._silent_ticks = 0
        try:
            while True:
                response = await call.read()
                if response is grpc.aio.EOF:
                    return "the worker ended the stream"
                self._receive(cast("pb.AttachResponse", response))
        except InvalidArgument as error:
            raise _OverError(f"protocol error: {error}") from error
        except BaseException as error:
            self._check_verdict()
            if not isinstance(error, BROKEN):
                raise
            return _reason(error)
        finally:
            call.cancel()
            await cancel_and_wait(writer)

    def _judge(self, verdict: _OverError) -> None:
        """End the session, whatever it waits for."""
        if self._verdict is None:
            self._verdict = verdict
            if self._call is not None:
                self._call.cancel()

    def _check_verdict(self) -> None:
        if self._verdict is not None:
            raise self._verdict

    def _tick(self) -> None:
        self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self._silent_ticks += 1
        self._idle_ticks = 0 if self._listeners else self._idle_ticks + 1
        silence_s = self._limits.heartbeat_timeout_s
        if self._idle_ticks * TICK_S >= self._limits.idle_s:
            self.is_over = True
            self._judge(_OverError("it was idle"))
        elif self._was_attached and self._silent_ticks * TICK_S >= silence_s:
            self._judge(_OverError(f"it was silent for {silence_s:g} s", died=True))

    # Out.

    async def _write(self, call: Call) -> None:
        try:
            for frame in self._sent.unacknowledged():
                await call.write(frame)
            while True:
                self._wake.clear()
                while (next_frame := self._next_frame()) is not None:
                    await call.write(next_frame)
                await self._wake.wait()
        except BROKEN:
            # The reader learns of it, and of the reason, itself.
            return

    def _next_frame(self) -> pb.AttachRequest | None:
        """What waits, cancels first; a bare acknowledgement if only that is due."""
        can_submit = bool(self._outbox) and not self._sent.is_full
        if not (can_submit or self._cancels or self._ack_due):
            return None
        self._acknowledged()
        frame = pb.AttachRequest(ack=self._received.last)
        if can_submit or self._cancels:
            frame.frame = self._sent.next_number()
            frame.cancels.extend(self._cancels[:_MAX_CANCELS])
            del self._cancels[:_MAX_CANCELS]
            if can_submit:
                submissions, chunks = self._outbox.take(_TAKE_LEN)
                frame.submissions.extend(submissions)
                frame.chunks.extend(chunks)
            self._sent.keep(frame, frame.ByteSize())
        return frame

    def _acknowledged(self) -> None:
        self._ack_due = False
        self._unacknowledged = 0
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None

    def _acknowledge_later(self) -> None:
        self._unacknowledged += 1
        if self._unacknowledged >= ACK_FRAMES:
            self._acknowledge_now()
        elif self._ack_timer is None:
            loop = asyncio.get_running_loop()
            self._ack_timer = loop.call_later(ACK_S, self._acknowledge_now)

    def _acknowledge_now(self) -> None:
        self._ack_due = True
        self._wake.set()

    # In.

    def _receive(self, frame: pb.AttachResponse) -> None:
        self._silent_ticks = 0
        if frame.ack:
            was_full = self._sent.is_full
            self._sent.acknowledge(frame.ack)
            if was_full:
                self._wake.set()
        if not self._received.accept(frame.frame):
            return
        if frame.frame:
            self._acknowledge_later()
        for scores in frame.logprobs:
            listener = self._listeners.get(scores.slot)
            if listener is not None:
                with self._guard(scores.slot):
                    listener.on_logprobs(scores.tokens, scores.prompt)
        if frame.slots:
            self._deliver(list(frame.slots), list(frame.token_ids))
        for end in frame.ends:
            listener = self._listeners.get(end.slot)
            if self._outbox and end.HasField("error"):
                # Refused before all of it was sent.
                self._outbox.discard(end.slot)
                self._cancelled.add(end.slot)
            self._free(end.slot)
            if listener is not None:
                with self._guard(end.slot):
                    listener.on_end(end_of(end))

    def _deliver(self, slots: list[int], token_ids: list[int]) -> None:
        if len(slots) != len(token_ids):
            raise InvalidArgument(f"{len(slots)} slots came with {len(token_ids)} token ids")
        listeners = self._listeners
        start, count = 0, len(slots)
        while start < count:
            slot = slots[start]
            end = start + 1
            while end < count and slots[end] == slot:
                end += 1
            listener = listeners.get(slot)
            if listener is not None:
                try:
                    listener.on_tokens(token_ids[start:end])
                except Exception as error:  # noqa: BLE001 - one's fault must not end all others
                    self.cancel(slot)
                    with self._guard(slot):
                        listener.on_end(End("error", 0, from_exception(error)))
            start = end

    @contextmanager
    def _guard(self, slot: int) -> Iterator[None]:
        """One listener's fault must not end all others' stream."""
        try:
            yield
        except Exception:
            log.exception("%s: the listener of slot %d failed", self.worker.worker_id, slot)

    def _free(self, slot: int) -> None:
        if self._listeners.pop(slot, _UNKNOWN) is _UNKNOWN:
            return
        if slot not in self._cancelled:
            heapq.heappush(self._free_slots, slot)
            return
        self._cancelled.discard(slot)
        if slot in self._cancels:
            self._cancels.remove(slot)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
