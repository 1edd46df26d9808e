"""The pool: work in, answers out, over processes that may die at any time.

Each worker process has a queue here and a short window of requests on its socket:

    queued (ours to take back) ... | sent, answered in order | -> worker

Where a request goes is decided in placement: long documents leave some workers
free, so that short requests never wait behind them. A worker with nothing to do
takes what waits for others. When a worker dies, what it had goes to the others and
another is forked; only the request it was working on is a suspect, and fails after
MAX_ATTEMPTS. Everything is bounded: see PoolLimits.

The parent only moves bytes. It knows nothing of tokenizers, and no gRPC.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from headrace.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    StartupError,
    Unavailable,
)
from headrace.service import cancel_and_wait
from services.tokenizer import placement, work
from services.tokenizer.spawner import Spawner
from services.tokenizer.worker_link import Job, WorkerLink

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence

    from headrace.models.files import ModelFiles

log = logging.getLogger("headrace.tokenizer")

#: A request that was being worked on at this many deaths is their cause.
MAX_ATTEMPTS = 2
#: Before a worker that died without having answered anything is replaced, in s.
_BACKOFF_S = 0.2
_WATCH_INTERVAL_S = 0.5
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What may wait, and how long a worker may take."""

    max_queued_bytes: int = 64 << 20
    max_queued: int = 8192
    #: A worker that does not answer for so long is killed.
    stall_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Done:
    """An answer, and where its time went."""

    answer: work.Answer
    queue_ms: float
    work_ms: float


class Pool:
    """`start` it inside the loop, `close` it at the end."""

    def __init__(
        self,
        models: Iterable[ModelFiles],
        num_processes: int,
        limits: PoolLimits | None = None,
        work_limits: work.Limits | None = None,
    ) -> None:
        self.infos: Sequence[work.Info] = ()
        self._limits = limits or PoolLimits()
        setup = [(files.name, files.format, str(files.path.resolve())) for files in models]
        self._setup = work.Setup(setup, work_limits or work.Limits())
        self._num_processes = num_processes
        self._num_kept_free = placement.num_kept_free(num_processes)
        self._max_texts = self._setup.limits.max_texts
        self._spawner = self._new_spawner()
        self._links: list[WorkerLink] = []
        #: What waits while no worker lives.
        self._homeless: deque[Job] = deque()
        self._last_id = 0
        self._waiting_bytes = 0
        self._waiting: set[Job] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self._is_closed = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def start(self) -> None:
        """Load, fork, and wait until every worker has said hello. Raises StartupError."""
        self.infos = await self._spawner.start()
        for slot in range(self._num_processes):
            await self._add_worker(slot)
        await asyncio.gather(*(link.is_settled.wait() for link in self._links))
        if not self.worker_pids:
            raise StartupError("no tokenizer process could be forked: see the log")
        self._own(self._watch())

    async def drain(self, timeout_s: float) -> None:
        """Wait until nothing waits, for `timeout_s` at most."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)

    async def close(self) -> None:
        """End all processes; what waits fails with Unavailable."""
        self._is_closed = True
        await cancel_and_wait(*self._tasks)
        for job in list(self._waiting):
            job.fail(Unavailable("the tokenizer is shutting down", retry_after_ms=500))
        for link in list(self._links):
            link.close()
        await self._spawner.close()

    @property
    def num_waiting(self) -> int:
        """Requests that have no answer yet."""
        return len(self._waiting)

    @property
    def load(self) -> int:
        """Bytes that lie in workers' queues or are being worked on."""
        return sum(link.load for link in self._links)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that have said hello."""
        return [link.pid for link in self._links if link.pid]

    @property
    def spawner_pid(self) -> int:
        """The spawner's process id."""
        return self._spawner.pid

    async def run(self, item: work.Work, *, timeout_s: float | None = None) -> Done:
        """Do `item` in some worker, a batch in several.

        Raises what the work raises, ResourceExhausted if too much waits,
        DeadlineExceeded after `timeout_s`, Internal if it kills its workers.
        Cancelling it takes it back; if it is being worked on, it stops if it is long.
        """
        if not isinstance(item, work.EncodeBatch):
            job = self._job(item)
            self._admit(job.length)
            return await self._run(job, timeout_s)
        num_texts = len(item.texts)
        if num_texts > self._max_texts or not num_texts:
            limit = f"there are {num_texts:,}, the limit is {self._max_texts:,}"
            raise InvalidArgument(limit if num_texts else "texts is empty", field="texts")
        jobs = [self._job(part) for part in placement.split(item)]
        self._admit(sum(job.length for job in jobs), len(jobs))
        tasks = [asyncio.ensure_future(self._run(job, timeout_s)) for job in jobs]
        try:
            parts = await asyncio.gather(*tasks)
        finally:
            await cancel_and_wait(*tasks)
        answers = [part.answer for part in parts if isinstance(part.answer, work.EncodedBatch)]
        return Done(
            placement.joined(answers),
            max(part.queue_ms for part in parts),
            sum(part.work_ms for part in parts),
        )

    def _job(self, item: work.Work) -> Job:
        self._last_id += 1
        frame = work.frame(item, self._last_id)
        kind, session = placement.kind_of(item, len(frame)), placement.session_of(item, len(frame))
        return Job(self._last_id, frame, kind, session)

    async def _run(self, job: Job, timeout_s: float | None) -> Done:
        started = perf_counter()
        self._waiting.add(job)
        self._is_idle.clear()
        self._waiting_bytes += job.length
        timer = None
        if timeout_s is not None:
            error = DeadlineExceeded(f"the tokenizer did not answer within {timeout_s:.3f} s")
            timer = asyncio.get_running_loop().call_later(timeout_s, job.fail, error)
        try:
            self._assign(job)
            answer, work_ns = await job.future
        finally:
            if timer is not None:
                timer.cancel()
            self._waiting.discard(job)
            self._waiting_bytes -= job.length
            self._withdraw(job)
            if not self._waiting:
                self._is_idle.set()
        if isinstance(answer, work.Failure):
            raise answer.error()
        work_ms = work_ns / 1e6
        return Done(answer, max(0.0, (perf_counter() - started) * 1e3 - work_ms), work_ms)

    def _withdraw(self, job: Job) -> None:
        if job.link is not None:
            job.link.withdraw(job)
        else:
            with suppress(ValueError):
                self._homeless.remove(job)

    def _admit(self, length: int, num_jobs: int = 1) -> None:
        limits = self._limits
        if self._is_closed:
            raise Unavailable("the tokenizer is shutting down", retry_after_ms=500)
        if len(self._waiting) + num_jobs > limits.max_queued:
            raise ResourceExhausted(
                f"{len(self._waiting)} requests wait for the tokenizer already", retry_after_ms=200
            )
        if self._waiting and self._waiting_bytes + length > limits.max_queued_bytes:
            raise ResourceExhausted(
                f"{self._waiting_bytes:,} bytes wait for the tokenizer already "
                f"(limit {limits.max_queued_bytes:,})",
                retry_after_ms=500,
            )

    def _assign(self, job: Job) -> None:
        loads = [(link.slot, link.load) for link in self._links]
        at = placement.choose(loads, job.kind, job.session, self._num_kept_free)
        if at is None:
            self._homeless.append(job)
        else:
            self._links[at].add(job)

    def _on_idle(self, link: WorkerLink) -> None:
        takes_long = link.slot >= self._num_kept_free
        others = [other for other in self._links if other.is_waited_for]
        for other in sorted(others, key=lambda other: -other.load):
            job = other.give(takes_long=takes_long)
            if job is not None:
                link.add(job)
                return

    async def _add_worker(self, slot: int) -> None:
        link = WorkerLink(slot, self._on_death, self._on_idle)
        await asyncio.get_running_loop().create_unix_connection(
            lambda: link, sock=self._spawner.spawn(yields=slot >= self._num_kept_free > 0)
        )
        if link.is_dead:
            return
        self._links.append(link)
        homeless, self._homeless = self._homeless, deque()
        for job in homeless:
            self._assign(job)

    def _on_death(self, link: WorkerLink, unanswered: list[Job]) -> None:
        if link in self._links:
            self._links.remove(link)
        if self._is_closed:
            return
        if link.is_ended:
            log.info("worker %d was ended; replacing it", link.pid)
        else:
            log.warning("worker %d died with %d requests; replacing it", link.pid, len(unanswered))
        is_sound = link.num_answered or link.is_ended
        self._own(self._replace(link.slot, 0.0 if is_sound else _BACKOFF_S))
        for job in unanswered:
            if job.num_attempts >= MAX_ATTEMPTS:
                internal = Internal()
                log.error("incident %s: a request killed its workers", internal.incident)
                job.fail(internal)
            else:
                self._assign(job)

    async def _replace(self, slot: int, delay_s: float) -> None:
        while True:
            await asyncio.sleep(delay_s)
            try:
                return await self._add_worker(slot)
            except OSError as error:
                log.error("can't connect a worker: %s", error)
                delay_s = _RETRY_S

    def _on_spawner_exit(self) -> None:
        if not self._is_closed:
            self._own(self._replace_spawner())

    async def _replace_spawner(self) -> None:
        """The workers go on; only new ones need a spawner."""
        log.error("the spawner died; starting another")
        while True:
            dead, self._spawner = self._spawner, self._new_spawner()
            await dead.close()
            try:
                await self._spawner.start()
                return
            except (StartupError, OSError) as error:
                log.error("can't start the spawner: %s", error)
                await asyncio.sleep(_RETRY_S)

    def _new_spawner(self) -> Spawner:
        return Spawner(self._setup, self._on_spawner_exit)

    async def _watch(self) -> None:
        """Kill workers that stopped answering: stopped, or stuck in one request."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            now = perf_counter()
            for link in self._links:
                if link.pid and link.is_stalled(now, self._limits.stall_s):
                    log.error("worker %d did not answer in time; killing it", link.pid)
                    link.end()

    def _own(self, work_to_do: Coroutine[object, object, object]) -> None:
        task = asyncio.ensure_future(work_to_do)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
