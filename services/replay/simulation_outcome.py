"""What came of each request so far, and the result that it adds up to."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from services.replay.simulation import COMPLETED, FAILED, SimulationResult, WorkerTotals

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.replay.simulation import SimulationConfig
    from services.replay.simulation_calls import Call, Gaps
    from services.replay.simulation_worker import SimulatedWorker


class Outcome:
    """What came of each request so far."""

    def __init__(self, num_requests: int) -> None:
        self.num_ended = 0
        self.last_end = 0.0
        self.errors: Counter[str] = Counter()
        self.arrived = np.zeros(num_requests)
        self.ttft_s = np.full(num_requests, np.nan)
        self.e2e_s = np.full(num_requests, np.nan)
        self.prompt_tokens = np.zeros(num_requests, np.int64)
        self.output_tokens = np.zeros(num_requests, np.int64)
        self.cached_tokens = np.zeros(num_requests, np.int64)
        self.matched_tokens = np.zeros(num_requests, np.int64)
        self.predicted_ttft_ms = np.zeros(num_requests)
        self.worker = np.full(num_requests, -1, np.int32)
        self.status = np.full(num_requests, FAILED, np.int8)
        self.migrations = np.zeros(num_requests, np.int32)

    def end(self, call: Call, status: int, now: float, hop: float, error: str = "") -> None:
        """The client knows at `now`; its tokens took a `hop` each."""
        at = call.number
        self.num_ended += 1
        self.status[at] = status
        self.prompt_tokens[at] = call.request.num_tokens
        self.output_tokens[at] = call.generated
        self.matched_tokens[at] = call.matched_tokens
        self.predicted_ttft_ms[at] = call.predicted_ttft_ms
        self.migrations[at] = call.num_migrations
        if call.first_at is not None:
            self.ttft_s[at] = call.first_at + hop - call.arrived
            self.last_end = max(self.last_end, call.last_at + hop)
        if status == COMPLETED:
            self.cached_tokens[at] = call.cached_tokens
            self.worker[at] = call.worker
            self.e2e_s[at] = now - call.arrived
        elif error:
            self.errors[error] += 1

    def result(
        self,
        config: SimulationConfig,
        gaps: Gaps,
        workers: Iterable[SimulatedWorker],
        *,
        kv_events: int,
        decisions: int,
    ) -> SimulationResult:
        """The result, once all requests have ended."""
        totals = self._totals(workers)
        gap_ms, gap_counts = gaps.arrays()
        first = float(self.arrived.min(initial=np.inf))
        return SimulationResult(
            config=config,
            arrival_ms=self.arrived * 1000,
            ttft_ms=self.ttft_s * 1000,
            e2e_ms=self.e2e_s * 1000,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            matched_tokens=self.matched_tokens,
            predicted_ttft_ms=self.predicted_ttft_ms,
            worker=self.worker,
            status=self.status,
            migrations=self.migrations,
            gap_ms=gap_ms,
            gap_counts=gap_counts,
            workers=tuple(totals),
            duration_ms=max(0.0, self.last_end - first) * 1000,
            kv_events=kv_events,
            decisions=decisions,
            steps=sum(worker.steps for worker in totals),
            errors=dict(self.errors),
        )

    def _totals(self, workers: Iterable[SimulatedWorker]) -> list[WorkerTotals]:
        """By worker's number, all its generations together."""
        steps: Counter[int] = Counter()
        preemptions: Counter[int] = Counter()
        busy_s: dict[int, float] = {}
        for worker in workers:
            steps[worker.number] += worker.num_steps
            preemptions[worker.number] += worker.core.num_preemptions
            busy_s[worker.number] = busy_s.get(worker.number, 0.0) + worker.busy_s
        # One sort instead of a pass over all requests for each worker.
        order = np.argsort(self.worker, kind="stable")
        numbers = self.worker[order]
        totals = []
        for number in sorted(busy_s):
            first, last = (np.searchsorted(numbers, number, side) for side in ("left", "right"))
            mine = order[first:last]
            totals.append(
                WorkerTotals(
                    number,
                    requests=len(mine),
                    prompt_tokens=int(self.prompt_tokens[mine].sum()),
                    cached_tokens=int(self.cached_tokens[mine].sum()),
                    output_tokens=int(self.output_tokens[mine].sum()),
                    steps=steps[number],
                    busy_ms=busy_s[number] * 1000,
                    preemptions=preemptions[number],
                )
            )
        return totals
