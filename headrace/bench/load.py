"""When requests are sent: closed or open loop, warm-up, an end by number or by time.

Open loop measures from when a request was meant to start, not from when it was sent: a
server that stalls, or a client that is late, shows in the figures ("How NOT to Measure
Latency", G. Tene).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from headrace.bench.sample import Sample
from headrace.bench.stats import Summary, summarize
from headrace.service import cancel_and_wait

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from headrace.bench.clients import Client
    from headrace.bench.sample import Prompt

#: Requests under way at once in open loop; beyond it they wait, and are late.
MAX_IN_FLIGHT = 8192


@dataclass(frozen=True, slots=True)
class Level:
    """One level of load: `concurrency` clients, or requests at the moments of `arrivals`.

    Ends after `num_requests`, or when `duration_s` is over (what runs is waited for).
    """

    concurrency: int = 0
    rate: float = 0.0
    arrivals: Iterator[float] | None = None
    num_requests: int | None = None
    duration_s: float | None = None

    @property
    def mode(self) -> str:
        return "closed" if self.arrivals is None else "open"

    @property
    def load(self) -> float:
        return float(self.concurrency) if self.arrivals is None else self.rate


@dataclass(slots=True)
class Progress:
    """What is going on, for whoever shows it."""

    level: Level
    began_at: float = 0.0
    num_sent: int = 0
    in_flight: int = 0
    num_tokens: int = 0
    num_errors: int = 0
    samples: list[Sample] = field(default_factory=list)


async def run_level(
    client: Client,
    prompts: Iterator[Prompt],
    level: Level,
    on_start: Callable[[Progress], None] = lambda _: None,
) -> tuple[Summary, list[Sample]]:
    """One level, to its end. Cancelled, it stops all it started."""
    progress = Progress(level)
    run = _Run(client, prompts, progress)
    cpu_s, began = time.process_time(), time.perf_counter()
    progress.began_at = began
    on_start(progress)
    try:
        await (run.closed() if level.arrivals is None else run.open(level.arrivals))
    finally:
        await run.close()
    summary = summarize(
        progress.samples,
        mode=level.mode,
        load=level.load,
        duration_s=time.perf_counter() - began,
        cpu_s=time.process_time() - cpu_s,
    )
    return summary, progress.samples


async def warm_up(client: Client, prompts: Iterator[Prompt], num_requests: int) -> None:
    """Send some that count for nothing, a few at a time."""
    run = _Run(client, prompts, Progress(Level(concurrency=8, num_requests=num_requests)))
    run.progress.began_at = time.perf_counter()
    try:
        await run.closed()
    finally:
        await run.close()


class _Run:
    def __init__(self, client: Client, prompts: Iterator[Prompt], progress: Progress) -> None:
        self.progress = progress
        self._client = client
        self._prompts = prompts
        self._tasks: set[asyncio.Task[None]] = set()

    async def closed(self) -> None:
        """Each client sends the next when its last is over."""
        level = self.progress.level
        num_clients = level.concurrency
        if level.num_requests is not None:
            num_clients = min(num_clients, level.num_requests)
        for _ in range(num_clients):
            self._spawn(self._one_client())
        await self._all_over()

    async def open(self, arrivals: Iterator[float]) -> None:
        """Send each at its moment, whatever has become of the others."""
        level, room = self.progress.level, asyncio.Semaphore(MAX_IN_FLIGHT)
        for at_s in islice(arrivals, level.num_requests):
            if level.duration_s is not None and at_s >= level.duration_s:
                break
            meant_at = self.progress.began_at + at_s
            # Made before its moment: that takes time of its own.
            prompt = next(self._prompts)
            await asyncio.sleep(max(0.0, meant_at - time.perf_counter()))
            await room.acquire()
            self._spawn(self._one(prompt, meant_at)).add_done_callback(lambda _: room.release())
        await self._all_over()

    async def close(self) -> None:
        await cancel_and_wait(*self._tasks)

    async def _one_client(self) -> None:
        level, progress = self.progress.level, self.progress
        while level.num_requests is None or progress.num_sent < level.num_requests:
            now = time.perf_counter()
            if level.duration_s is not None and now - progress.began_at >= level.duration_s:
                return
            progress.num_sent += 1
            prompt = next(self._prompts)
            await self._one(prompt, time.perf_counter(), counted=True)

    async def _one(self, prompt: Prompt, meant_at: float, *, counted: bool = False) -> None:
        progress, sample = self.progress, Sample(meant_at)
        progress.num_sent += not counted
        progress.in_flight += 1
        sample.sent_at = time.perf_counter()
        try:
            await self._client.generate(prompt, sample)
        finally:
            progress.in_flight -= 1
        sample.ended_at = sample.ended_at or time.perf_counter()
        if not sample.error and not sample.deltas:
            sample.fail("no output", "the stream ended without a token")
        progress.samples.append(sample)
        progress.num_tokens += sample.output_tokens
        progress.num_errors += bool(sample.error)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _all_over(self) -> None:
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
