"""The pool: work in, answers out, over processes that may die at any time.

Each worker process has a queue here and a short window of requests on its socket:

    queued (ours to take back) ... | sent, answered in order | -> worker

A request goes to the worker with the fewest bytes; long ones leave one worker
free, so that short ones never wait behind them. When a worker dies, what it had
goes to the others and another is forked; only the request it was working on is a
suspect, and fails after MAX_ATTEMPTS. Everything is bounded: see PoolLimits.

The parent only moves bytes. It knows nothing of tokenizers, and no gRPC.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from headrace.errors import (
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    StartupError,
    Unavailable,
)
from headrace.service import cancel_and_wait
from services.tokenizer import work
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
    #: A longer request leaves one worker free of its like.
    long_bytes: int = 64 << 10


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
        for _ in range(self._num_processes):
            await self._add_worker()
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
        """Do `item` in some worker.

        Raises what the work raises, ResourceExhausted if too much waits,
        DeadlineExceeded after `timeout_s`, Internal if it kills its workers.
        Cancelling it takes it back, if it is not being worked on.
        """
        self._last_id += 1
        job = Job(self._last_id, work.frame(item, self._last_id))
        self._admit(job.length)
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
            job.withdraw()
            if not self._waiting:
                self._is_idle.set()
        if isinstance(answer, work.Failure):
            raise answer.error()
        work_ms = work_ns / 1e6
        return Done(answer, max(0.0, (perf_counter() - started) * 1e3 - work_ms), work_ms)

    def _admit(self, length: int) -> None:
        limits = self._limits
        if self._is_closed:
            raise Unavailable("the tokenizer is shutting down", retry_after_ms=500)
        if len(self._waiting) >= limits.max_queued:
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
        links = self._links
        if job.length > self._limits.long_bytes:
            links = links[1:] or links
        if links:
            min(links, key=lambda link: link.load).add(job)
        else:
            self._homeless.append(job)

    async def _add_worker(self) -> None:
        link = WorkerLink(self._on_death)
        await asyncio.get_running_loop().create_unix_connection(
            lambda: link, sock=self._spawner.spawn()
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
        log.warning("worker %d died with %d requests; replacing it", link.pid, len(unanswered))
        self._own(self._replace(0.0 if link.num_answered else _BACKOFF_S))
        for job in unanswered:
            if job.num_attempts >= MAX_ATTEMPTS:
                internal = Internal()
                log.error("incident %s: a request killed its workers", internal.incident)
                job.fail(internal)
            else:
                self._assign(job)

    async def _replace(self, delay_s: float) -> None:
        while True:
            await asyncio.sleep(delay_s)
            try:
                return await self._add_worker()
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
                    # It holds its socket, so the id is not another's by now.
                    with suppress(ProcessLookupError):
                        os.kill(link.pid, signal.SIGKILL)

    def _own(self, work_to_do: Coroutine[object, object, object]) -> None:
        task = asyncio.ensure_future(work_to_do)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
