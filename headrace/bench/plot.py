"""The picture: latency by percentile and its histogram, or latency against load.

Needs matplotlib, which only `--plot` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.bench.stats import Summary, gaps
from headrace.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from headrace.bench.sample import Sample

_BLUE, _ORANGE, _GREEN, _GREY = "#2f6db3", "#d9822b", "#3a8f5c", "#8a8a8a"


def check() -> None:
    """Raises StartupError if pictures can't be drawn here: before the load, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise StartupError(
            "--plot needs matplotlib: pip install 'headrace[bench]', or leave it out"
        ) from error


def draw(
    path: Path, title: str, summaries: Sequence[Summary], samples: Sequence[Sequence[Sample]]
) -> None:
    """Write the picture that suits one level, or several. Raises StartupError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, 2)
    if len(summaries) == 1:
        _percentiles(axes[0], samples[0])
        _histogram(axes[1], samples[0])
    else:
        _against_load(axes[0], summaries)
        _throughput(axes[1], summaries)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise StartupError(f"--plot {path}: {error}") from error


def _percentiles(axis: Any, samples: Sequence[Sample]) -> None:
    for label, color, values in _series(samples):
        ordered = sorted(values)
        if ordered:
            shares = [100 * (rank + 0.5) / len(ordered) for rank in range(len(ordered))]
            axis.plot(shares, [1000 * value for value in ordered], color=color, label=label)
    axis.set(xlabel="percentile", ylabel="ms", yscale="log", title="latency by percentile")
    axis.legend(frameon=False)


def _histogram(axis: Any, samples: Sequence[Sample]) -> None:
    (label, color, values), *_ = _series(samples)
    axis.hist([1000 * value for value in values], bins=40, color=color, alpha=0.85)
    axis.set(xlabel=f"{label}, ms", ylabel="requests", title=f"histogram of {label}")


def _series(samples: Sequence[Sample]) -> list[tuple[str, str, list[float]]]:
    good = [sample for sample in samples if not sample.error and sample.deltas]
    return [
        ("TTFT", _BLUE, [sample.ttft_s for sample in good]),
        ("ITL", _ORANGE, list(gaps(good))),
        ("end to end", _GREEN, [sample.latency_s for sample in good]),
    ]


def _against_load(axis: Any, summaries: Sequence[Summary]) -> None:
    loads = [summary.load for summary in summaries]
    for label, color, of in (
        ("TTFT", _BLUE, [summary.ttft_s for summary in summaries]),
        ("ITL", _ORANGE, [summary.itl_s for summary in summaries]),
    ):
        axis.plot(loads, [1000 * d.p50 for d in of], "o-", color=color, label=f"{label} p50")
        axis.plot(loads, [1000 * d.p99 for d in of], "o--", color=color, label=f"{label} p99")
    axis.set(xlabel=_load_name(summaries), ylabel="ms", yscale="log", title="latency against load")
    axis.legend(frameon=False, fontsize=8)


def _throughput(axis: Any, summaries: Sequence[Summary]) -> None:
    loads = [summary.load for summary in summaries]
    axis.plot(loads, [s.output_tokens_per_s for s in summaries], "o-", color=_GREEN)
    axis.set(xlabel=_load_name(summaries), ylabel="tokens/s", ylim=(0, None), title="throughput")
    failed = [(s.load, s.output_tokens_per_s) for s in summaries if s.succeeded < s.requests]
    for load, rate in failed:
        axis.annotate("errors", (load, rate), color=_GREY, fontsize=8)


def _load_name(summaries: Sequence[Summary]) -> str:
    return "clients" if summaries[0].mode == "closed" else "requests/s"
