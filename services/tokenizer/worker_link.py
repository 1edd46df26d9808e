"""One worker process as the pool sees it: its queue, its window, its socket."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import OrderedDict, deque
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, cast

from services.tokenizer import work

if TYPE_CHECKING:
    from collections.abc import Callable

    from headrace.errors import HeadraceError
    from services.tokenizer.placement import Kind

#: What a worker may have on its socket: enough to keep it busy, little enough that a
#: short request waits for no more, and that the rest can be taken back.
_WINDOW_BYTES = 8 << 10
_WINDOW_JOBS = 16
#: After so many short requests one of the others is sent, so that all get their turn.
_MAX_PASSED = 32
#: Work of more bytes than this ends, and its process with it, when nobody waits for it:
#: it would take more than some 50 ms.
_END_BYTES = 128 << 10


class Job:
    """One request, until its future is done."""

    __slots__ = ("frame", "future", "job_id", "kind", "length", "link", "num_attempts", "session")

    def __init__(self, job_id: int, frame: bytes, kind: Kind, session: int | None) -> None:
        self.job_id = job_id
        self.frame = frame
        self.kind = kind
        #: See placement.session_of.
        self.session = session
        self.length = len(frame)
        self.future: asyncio.Future[tuple[work.Answer, int]] = (
            asyncio.get_running_loop().create_future()
        )
        #: Deaths of workers that were working on it.
        self.num_attempts = 0
        self.link: WorkerLink | None = None

    def fail(self, error: HeadraceError) -> None:
        """End it with `error`, unless it has ended."""
        if not self.future.done():
            self.future.set_exception(error)


class WorkerLink(asyncio.Protocol):
    """The pool's end of a worker's socket. Answers come in the order of requests.

    `on_death(link, unanswered)` is called once, when the worker is gone;
    `on_idle(link)` when it has nothing more to do.
    """

    def __init__(
        self,
        slot: int,
        on_death: Callable[[WorkerLink, list[Job]], None],
        on_idle: Callable[[WorkerLink], None],
    ) -> None:
        #: Its place among the workers, which its successor takes.
        self.slot = slot
        self.pid = 0
        #: Set when the worker has said hello, or has died.
        self.is_settled = asyncio.Event()
        self.is_dead = False
        #: Whether it was ended on purpose.
        self.is_ended = False
        self.num_answered = 0
        #: Bytes that wait for it, sent or not.
        self.load = 0
        self._on_death = on_death
        self._on_idle = on_idle
        self._transport: asyncio.Transport | None = None
        #: What is short, and the rest, each in order.
        self._short: OrderedDict[int, Job] = OrderedDict()
        self._rest: OrderedDict[int, Job] = OrderedDict()
        #: Short ones sent since one of the rest was, while some waited.
        self._num_passed = 0
        self._sent: deque[Job] = deque()
        self._sent_bytes = 0
        self._at_work_since = 0.0
        self._buffer = bytearray()

    @property
    def is_waited_for(self) -> bool:
        """Whether it has jobs that it was not sent."""
        return bool(self._short or self._rest)

    def add(self, job: Job) -> None:
        """Queue `job` here."""
        job.link = self
        self.load += job.length
        queue = self._short if job.kind == "short" else self._rest
        queue[job.job_id] = job
        self._pump()

    def withdraw(self, job: Job) -> None:
        """Take `job` back if it is not sent; else its answer will be dropped, or the worker
        ended if it is long at it: nothing less stops it."""
        queue = self._short if job.kind == "short" else self._rest
        if queue.pop(job.job_id, None) is not None:
            self.load -= job.length
        elif self._sent and self._sent[0] is job and job.length > _END_BYTES:
            self.end()

    def give(self, *, takes_long: bool) -> Job | None:
        """Take one of the jobs back that are not sent, for another worker."""
        for queue in (self._short, self._rest):
            for job in queue.values():
                if takes_long or job.kind != "long":
                    self.withdraw(job)
                    return job
        return None

    def end(self) -> None:
        """Kill the worker."""
        self.is_ended = True
        if self.pid:
            # It holds its socket, so the id is not another's by now.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def is_stalled(self, now: float, limit_s: float) -> bool:
        """Whether it has worked on one request for longer than `limit_s`."""
        return bool(self._sent) and now - self._at_work_since > limit_s

    def close(self) -> None:
        """Close the socket; the worker ends."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.is_dead = True
        self.is_settled.set()
        if self._sent:
            self._sent[0].num_attempts += 1
        jobs = (*self._sent, *self._short.values(), *self._rest.values())
        unanswered = [job for job in jobs if not job.future.done()]
        for job in unanswered:
            job.link = None
        self._sent.clear()
        self._short.clear()
        self._rest.clear()
        self._on_death(self, unanswered)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= work.HEADER.size:
            length, job_id, work_ns = work.HEADER.unpack_from(buffer, start)
            end = start + work.HEADER.size - work.HEADER_REST_LEN + length
            if end > len(buffer):
                break
            self._receive(job_id, work_ns, bytes(buffer[start + work.HEADER.size : end]))
            start = end
        del buffer[:start]
        self._pump()
        if not self._sent:
            self._on_idle(self)

    def _receive(self, job_id: int, value: int, body: bytes) -> None:
        if job_id == 0:
            self.pid = value
            self.is_settled.set()
            return
        job = self._sent.popleft()
        assert job.job_id == job_id
        self.num_answered += 1
        self.load -= job.length
        self._sent_bytes -= job.length
        self._at_work_since = perf_counter()
        if not job.future.done():
            job.future.set_result((work.decode_answer(body), value))

    def _pump(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        while self._short or self._rest:
            is_turn = not self._short or (self._rest and self._num_passed >= _MAX_PASSED)
            queue = self._rest if is_turn else self._short
            job = next(iter(queue.values()))
            is_full = (
                self._sent_bytes + job.length > _WINDOW_BYTES or len(self._sent) >= _WINDOW_JOBS
            )
            if self._sent and is_full:
                return
            del queue[job.job_id]
            self._num_passed = 0 if is_turn or not self._rest else self._num_passed + 1
            if not self._sent:
                self._at_work_since = perf_counter()
            self._sent.append(job)
            self._sent_bytes += job.length
            self._transport.write(job.frame)
