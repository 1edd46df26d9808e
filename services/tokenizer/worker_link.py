"""One worker process as the pool sees it: its queue, its window, its socket."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from time import perf_counter
from typing import TYPE_CHECKING, cast

from services.tokenizer import work

if TYPE_CHECKING:
    from collections.abc import Callable

    from headrace.errors import HeadraceError

#: What a worker may have on its socket beside the request it works on: enough to
#: keep it busy, little enough to take the rest back when it dies or hangs.
_WINDOW_BYTES = 64 << 10
_WINDOW_JOBS = 16


class Job:
    """One request, until its future is done."""

    __slots__ = ("frame", "future", "job_id", "length", "link", "num_attempts")

    def __init__(self, job_id: int, frame: bytes) -> None:
        self.job_id = job_id
        self.frame = frame
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

    def withdraw(self) -> None:
        """Nobody waits for it any more."""
        if self.link is not None:
            self.link.withdraw(self)


class WorkerLink(asyncio.Protocol):
    """The pool's end of a worker's socket. Answers come in the order of requests.

    `on_death(link, unanswered)` is called once, when the worker is gone.
    """

    def __init__(self, on_death: Callable[[WorkerLink, list[Job]], None]) -> None:
        self.pid = 0
        #: Set when the worker has said hello, or has died.
        self.is_settled = asyncio.Event()
        self.is_dead = False
        self.num_answered = 0
        #: Bytes that wait for it, sent or not.
        self.load = 0
        self._on_death = on_death
        self._transport: asyncio.Transport | None = None
        self._queue: OrderedDict[int, Job] = OrderedDict()
        self._sent: deque[Job] = deque()
        self._sent_bytes = 0
        self._at_work_since = 0.0
        self._buffer = bytearray()

    def add(self, job: Job) -> None:
        """Queue `job` here."""
        job.link = self
        self.load += job.length
        self._queue[job.job_id] = job
        self._pump()

    def withdraw(self, job: Job) -> None:
        """Take `job` back if it is not sent; else its answer will be dropped."""
        if self._queue.pop(job.job_id, None) is not None:
            self.load -= job.length

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
        unanswered = [j for j in (*self._sent, *self._queue.values()) if not j.future.done()]
        for job in unanswered:
            job.link = None
        self._sent.clear()
        self._queue.clear()
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
        while self._queue:
            job = next(iter(self._queue.values()))
            is_full = (
                self._sent_bytes + job.length > _WINDOW_BYTES or len(self._sent) >= _WINDOW_JOBS
            )
            if self._sent and is_full:
                return
            del self._queue[job.job_id]
            if not self._sent:
                self._at_work_since = perf_counter()
            self._sent.append(job)
            self._sent_bytes += job.length
            self._transport.write(job.frame)
