"""From samples to the figures that are told. Pure.

Percentiles are linear between the nearest ranks, as numpy's default. Times in seconds.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from headrace.bench.sample import Sample

PERCENTILES = (50, 90, 95, 99)


class Distribution(msgspec.Struct, frozen=True):
    """Of one figure over all requests, or all gaps. `count` 0: the rest is 0."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True):
    """One level of load. `load` is what was asked for: clients, or requests a second."""

    mode: str
    load: float
    duration_s: float
    requests: int
    succeeded: int
    errors: dict[str, int]
    #: One text for each kind of error.
    examples: dict[str, str]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_s: Distribution
    itl_s: Distribution
    tpot_s: Distribution
    latency_s: Distribution
    #: How late requests were sent, against when they were meant to start.
    lateness_s: Distribution
    #: Share of one core that this client took itself.
    client_cpu: float


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order; there must be one."""
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def distribution(values: Iterable[float]) -> Distribution:
    """Of any number of values, none too."""
    ordered = sorted(values)
    if not ordered:
        return Distribution(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    p50, p90, p95, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
    mean = math.fsum(ordered) / len(ordered)
    return Distribution(len(ordered), mean, p50, p90, p95, p99, ordered[-1])


def gaps(samples: Iterable[Sample]) -> Iterable[float]:
    """Between one delta and the next, of each request."""
    for sample in samples:
        deltas = sample.deltas
        for index in range(1, len(deltas)):
            yield deltas[index] - deltas[index - 1]


def summarize(
    samples: Sequence[Sample], *, mode: str, load: float, duration_s: float, cpu_s: float
) -> Summary:
    """All of one level. Failed requests count as errors and in nothing else."""
    good = [sample for sample in samples if not sample.error]
    bad = [sample for sample in samples if sample.error]
    with_output = [sample for sample in good if sample.deltas]
    output_tokens = sum(sample.output_tokens for sample in good)
    return Summary(
        mode=mode,
        load=load,
        duration_s=duration_s,
        requests=len(samples),
        succeeded=len(good),
        errors=dict(Counter(sample.error for sample in bad).most_common()),
        examples={sample.error: sample.detail for sample in reversed(bad)},
        prompt_tokens=sum(sample.prompt_tokens for sample in good),
        cached_tokens=sum(sample.cached_tokens for sample in good),
        output_tokens=output_tokens,
        requests_per_s=len(good) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        ttft_s=distribution(sample.ttft_s for sample in with_output),
        itl_s=distribution(gaps(good)),
        tpot_s=distribution(tpot for sample in good if (tpot := sample.tpot_s) is not None),
        latency_s=distribution(sample.latency_s for sample in good),
        lateness_s=distribution(max(0.0, s.sent_at - s.meant_at) for s in samples),
        client_cpu=cpu_s / duration_s,
    )
