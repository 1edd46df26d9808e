"""Four routers that tell each other their loads place bursts about as evenly as one."""

from __future__ import annotations

from statistics import fmean

from benchmarks.harness.bursts import compare


def test_four_routers_spread_bursts_nearly_as_one_does() -> None:
    one, four = compare(range(4), duration_ms=2000)
    ratio = fmean(b.deviation / a.deviation for a, b in zip(one, four, strict=True))
    assert ratio < 1.3
    # It is the same work, and as much of it found in caches.
    assert abs(fmean(a.mean for a in one) - fmean(b.mean for b in four)) < 1
    assert fmean(b.matched for b in four) > fmean(a.matched for a in one) - 0.05
