"""What a replay comes to: percentiles, throughput, reuse and how evenly load lay.

Pure sums over a `SimulationResult`; it prints and draws nothing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from services.replay.floor import floor_ttft_ms
from services.replay.runs import label
from services.replay.simulation import (
    COMPLETED,
    FAILED,
    REFUSED,
    SimulationConfig,
    WorkerTotals,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from services.replay.simulation import SimulationResult

#: Percentiles that are reported, by the names of `Latency`'s fields.
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
#: Causes of failure that a report tells apart.
MAX_ERRORS = 10


@dataclass(frozen=True, slots=True)
class Latency:
    """A distribution, in ms. All NaN where nothing was measured."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: NDArray[np.float64], counts: NDArray[np.int64] | None = None) -> Latency:
        """Of `values`, each `counts` times (None: once). NaN is left out.

        Percentiles are the smallest value that at least so many values do not exceed.
        """
        counts = np.ones(len(values), np.int64) if counts is None else counts
        kept = ~np.isnan(values) & (counts > 0)
        values, counts = values[kept], counts[kept]
        if not len(values):
            nan = math.nan
            return cls(0, nan, nan, nan, nan, nan, nan)
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
        cumulative = np.cumsum(counts)
        total = int(cumulative[-1])
        ranks = [math.ceil(total * p / 100) for p in PERCENTILES.values()]
        p50, p90, p95, p99 = (float(values[at]) for at in np.searchsorted(cumulative, ranks))
        mean = float((values * counts).sum()) / total
        return cls(total, mean, p50, p90, p95, p99, float(values[-1]))


@dataclass(frozen=True, slots=True)
class Report:
    """One policy at one speed."""

    config: SimulationConfig
    ttft: Latency
    #: Gaps between a sequence's tokens, of all sequences.
    itl: Latency
    e2e: Latency
    #: TTFT if every request had been alone on an idle worker, with the reuse that it had.
    floor_ttft: Latency
    requests: int
    completed: int
    failed: int
    #: Turned away: more than a worker can hold, or than may wait.
    refused: int
    #: Requests that went on at another worker.
    migrated: int
    preemptions: int
    #: Virtual seconds from the first arrival to the last token.
    duration_s: float
    #: Arrivals per second that the trace asks for at this speed.
    offered_requests_per_s: float
    requests_per_s: float
    output_tokens_per_s: float
    #: Cached prompt tokens / prompt tokens, of requests that started.
    reuse_ratio: float
    #: Largest / mean over the workers: 1 is even. Time in steps, and tokens computed.
    busy_spread: float
    token_spread: float
    #: Median of |predicted TTFT - TTFT| / TTFT: how well the router knew.
    prediction_error: float
    decisions: int
    kv_events: int
    steps: int
    #: Causes and how many requests each ended, the commonest first.
    errors: dict[str, int]
    workers: tuple[WorkerTotals, ...]

    @property
    def label(self) -> str:
        """For tables and legends."""
        return label(self.config)


def summarize(result: SimulationResult) -> Report:
    """The report on one replay."""
    status = result.status
    workers = result.workers
    computed = [w.prompt_tokens - w.cached_tokens + w.output_tokens for w in workers]
    return Report(
        config=result.config,
        ttft=Latency.of(result.ttft_ms),
        itl=Latency.of(result.gap_ms, result.gap_counts),
        e2e=Latency.of(result.e2e_ms),
        floor_ttft=Latency.of(floor_ttft_ms(result)),
        requests=len(status),
        completed=int((status == COMPLETED).sum()),
        failed=int((status == FAILED).sum()),
        refused=int((status == REFUSED).sum()),
        migrated=int((result.migrations > 0).sum()),
        preemptions=sum(worker.preemptions for worker in workers),
        duration_s=result.duration_ms / 1000,
        offered_requests_per_s=_offered(result.arrival_ms),
        requests_per_s=result.requests_per_s,
        output_tokens_per_s=result.output_tokens_per_s,
        reuse_ratio=result.reuse_ratio,
        busy_spread=_spread([worker.busy_ms for worker in workers]),
        token_spread=_spread(computed),
        prediction_error=_prediction_error(result),
        decisions=result.decisions,
        kv_events=result.kv_events,
        steps=result.steps,
        errors=grouped(result.errors),
        workers=workers,
    )


def grouped(errors: dict[str, int]) -> dict[str, int]:
    """`errors`, those together that differ in numbers only where there are many."""
    if len(errors) > MAX_ERRORS:
        counted: Counter[str] = Counter()
        for text, count in errors.items():
            counted[re.sub(r"\d+", "N", text)] += count
        errors = counted
    common = sorted(errors.items(), key=lambda item: (-item[1], item[0]))
    return dict(common[:MAX_ERRORS])


def as_json(report: Report) -> dict[str, Any]:
    """`report` for a JSON file: plain values, NaN as null, no time of this machine."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(report))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _offered(arrival_ms: NDArray[np.float64]) -> float:
    """Requests per second; NaN if all come at one moment."""
    lasted_ms = float(arrival_ms[-1] - arrival_ms[0]) if len(arrival_ms) else 0.0
    return len(arrival_ms) / lasted_ms * 1000 if lasted_ms else math.nan


def _spread(values: list[float] | list[int]) -> float:
    mean = sum(values) / len(values) if values else 0.0
    return max(values) / mean if mean else math.nan


def _prediction_error(result: SimulationResult) -> float:
    known = ~np.isnan(result.ttft_ms) & ~np.isnan(result.predicted_ttft_ms)
    known &= (result.migrations == 0) & (result.ttft_ms > 0)
    actual = result.ttft_ms[known]
    errors = np.abs(result.predicted_ttft_ms[known] - actual) / actual
    return float(np.median(errors)) if len(errors) else math.nan
