"""A picture of replays: latencies and reuse against load, a colour for each policy.

With one speed there is no load to draw against: then bars, a group for each percentile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from headrace.errors import StartupError
from services.replay.report import PERCENTILES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from services.replay.report import Latency, Report

SUFFIXES = (".png", ".svg", ".pdf")
#: Okabe and Ito's colours, which most colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FLOOR_COLOUR = "0.6"
_MARKERS = "osD^vPX"
#: Percentiles of one policy, from the faintest line to the one that stands out.
_LINES: dict[str, Any] = {"p50": ":", "p95": "--", "p99": "-"}
_PANELS = {
    "time to first token": "ttft",
    "inter-token latency": "itl",
    "end to end": "e2e",
}


def check_suffix(path: Path) -> None:
    """Raises StartupError unless `path` names a kind of picture, and matplotlib is there."""
    if path.suffix.lower() not in SUFFIXES:
        raise StartupError(f"--plot writes {', '.join(SUFFIXES)}, not {str(path)!r}")
    try:
        import matplotlib.figure  # noqa: F401  # whether it is there, before minutes of replay
    except ModuleNotFoundError as error:
        raise StartupError("--plot needs matplotlib: pip install 'headrace[replay]'") from error


def plot(reports: Sequence[Report], path: Path, *, title: str) -> None:
    """Draw `reports` into the file `path`. Raises StartupError if it can't be written."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    by_policy: dict[str, list[Report]] = {}
    for report in sorted(reports, key=lambda report: report.config.speed):
        by_policy.setdefault(report.config.policy, []).append(report)
    is_curve = any(len(some) > 1 for some in by_policy.values())
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, 7.5), layout="constrained", dpi=130)
        figure.suptitle(title, fontsize=10)
        axes = figure.subplots(2, 2)
        for panel, (name, field) in zip(axes.flat, _PANELS.items(), strict=False):
            panel.set_title(f"{name}, ms", loc="left", fontweight="bold")
            (_curves if is_curve else _bars)(panel, by_policy, field)
        _reuse(axes[1][1], by_policy, is_curve=is_curve)
        handles = _legend(by_policy, is_curve=is_curve)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False
        )
        try:
            figure.savefig(path)
        except OSError as error:
            raise StartupError(f"{path} can't be written: {error.strerror or error}") from error


def _curves(panel: Axes, by_policy: dict[str, list[Report]], field: str) -> None:
    for number, reports in enumerate(by_policy.values()):
        colour, marker = _look(number)
        for name, line in _LINES.items():
            panel.plot(
                [_load(report) for report in reports],
                [getattr(getattr(report, field), name) for report in reports],
                linestyle=line, color=colour, marker=marker, markersize=4,
                alpha=1.0 if name == "p99" else 0.75,
            )  # fmt: skip
    if field == "ttft":
        # Of the policy that reused most: nobody is below it.
        best = max(by_policy.values(), key=lambda reports: max(r.reuse_ratio for r in reports))
        floor = [report.floor_ttft.p50 for report in best]
        panel.plot([_load(report) for report in best], floor, color=_FLOOR_COLOUR, linewidth=1)
    _scale(panel, by_policy, field, tuple(_LINES))
    _load_axis(panel, by_policy)


def _bars(panel: Axes, by_policy: dict[str, list[Report]], field: str) -> None:
    width = 0.8 / len(by_policy)
    for number, (report,) in enumerate(by_policy.values()):
        latency: Latency = getattr(report, field)
        places = [x - 0.4 + width * (number + 0.5) for x in range(len(PERCENTILES))]
        figures = [getattr(latency, name) for name in PERCENTILES]
        panel.bar(places, figures, width * 0.92, color=_look(number)[0])
    panel.set_xticks(range(len(PERCENTILES)), list(PERCENTILES))
    _scale(panel, by_policy, field, tuple(PERCENTILES))


def _reuse(panel: Axes, by_policy: dict[str, list[Report]], *, is_curve: bool) -> None:
    panel.set_title("prompt tokens found in a KV cache, %", loc="left", fontweight="bold")
    for number, reports in enumerate(by_policy.values()):
        colour, marker = _look(number)
        shares = [100 * report.reuse_ratio for report in reports]
        if is_curve:
            loads = [_load(report) for report in reports]
            panel.plot(loads, shares, color=colour, marker=marker, markersize=4)
        else:
            panel.bar_label(panel.bar([number], shares, 0.7, color=colour), fmt="%.1f %%")
    if is_curve:
        _load_axis(panel, by_policy)
    else:
        panel.set_xticks(range(len(by_policy)), list(by_policy))
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", alpha=0.3)


def _legend(by_policy: dict[str, list[Report]], *, is_curve: bool) -> list[Artist]:
    """Colours are policies, kinds of lines percentiles."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    looks = {policy: _look(number) for number, policy in enumerate(by_policy)}
    if not is_curve:
        return [Patch(color=colour, label=policy) for policy, (colour, _) in looks.items()]
    handles: list[Artist] = [
        Line2D([], [], color=colour, marker=marker, markersize=4, label=policy)
        for policy, (colour, marker) in looks.items()
    ]
    handles += [Line2D([], [], color="0.3", linestyle=_LINES[name], label=name) for name in _LINES]
    floor = "p50 TTFT alone on an idle worker"
    return [*handles, Line2D([], [], color=_FLOOR_COLOUR, linewidth=1, label=floor)]


def _load_axis(panel: Axes, by_policy: dict[str, list[Report]]) -> None:
    """Requests per second, where the trace has a rate, with the speeds below."""
    reports = next(iter(by_policy.values()))
    if any(math.isnan(report.offered_requests_per_s) for report in reports):
        panel.set_xlabel("speed (× the trace's)")
        return
    panel.set_xlabel("load: requests/s asked for (× the trace's speed)")
    panel.set_xticks(
        [_load(report) for report in reports],
        [f"{_load(report):.3g}\n×{report.config.speed:g}" for report in reports],
    )


def _load(report: Report) -> float:
    rate = report.offered_requests_per_s
    return report.config.speed if math.isnan(rate) else rate


def _scale(
    panel: Axes, by_policy: dict[str, list[Report]], field: str, names: Sequence[str]
) -> None:
    """Logarithmic where values span more than a linear axis can show."""
    from matplotlib.ticker import LogLocator, NullFormatter

    latencies = [getattr(report, field) for reports in by_policy.values() for report in reports]
    values = [getattr(latency, name) for latency in latencies for name in names]
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 20 * min(positive):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    panel.grid(axis="y", alpha=0.3)


def _look(number: int) -> tuple[str, str]:
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
