"""Reports as tables for a terminal: several policies and speeds side by side.

It computes nothing and draws no pictures (see `plot`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from services.replay.report import PERCENTILES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from services.replay.report import Latency, Report

_LATENCIES = {
    "TTFT": "ttft",
    "  alone on an idle worker": "floor_ttft",
    "ITL": "itl",
    "end to end": "e2e",
}
_LEGEND = """
asked/s, done/s: requests; tokens/s: generated; reuse: prompt tokens found in a KV cache;
spread: busy time of the busiest worker / mean; migrated: went on at another worker"""


def tables(reports: Sequence[Report]) -> RenderableType:
    """All there is to say of `reports`, for a console."""
    parts: list[RenderableType] = [_latencies(reports), Text(), _fleet(reports), Text(_LEGEND)]
    lost = [report for report in reports if report.failed or report.refused]
    for report in lost:
        why = ", ".join(f"{count:,} × {text}" for text, count in report.errors.items())
        parts.append(Text(f"{report.label}: {why or 'no cause given'}"))
    return Group(*parts)


def _latencies(reports: Sequence[Report]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("latency, ms")
    table.add_column("policy", no_wrap=True)
    table.add_column("speed", justify="right")
    for name in ("mean", *PERCENTILES, "max"):
        table.add_column(name, justify="right")
    for title, field in _LATENCIES.items():
        for position, report in enumerate(reports):
            latency: Latency = getattr(report, field)
            figures = [getattr(latency, name) for name in ("mean", *PERCENTILES, "max")]
            table.add_row(
                title if not position else "",
                report.config.policy,
                f"×{report.config.speed:g}",
                *(ms(figure) for figure in figures),
                style="dim" if field == "floor_ttft" else "",
                end_section=position == len(reports) - 1,
            )
    return table


def _fleet(reports: Sequence[Report]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("policy", no_wrap=True)
    for name in (
        "speed", "asked/s", "done/s", "tokens/s", "reuse", "spread", "completed", "failed",
        "refused", "migrated", "preempted",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        table.add_row(
            report.config.policy,
            f"×{report.config.speed:g}",
            _figure(report.offered_requests_per_s, ".2f"),
            _figure(report.requests_per_s, ".2f"),
            _figure(report.output_tokens_per_s, ",.0f"),
            _figure(report.reuse_ratio, ".1%"),
            _figure(report.busy_spread, ".2f"),
            f"{report.completed:,}",
            *(f"{number:,}" for number in (report.failed, report.refused)),
            *(f"{number:,}" for number in (report.migrated, report.preemptions)),
        )
    return table


def ms(value: float) -> str:
    """Milliseconds: one decimal below 100, none above; – for NaN."""
    return _figure(value, ",.1f" if value < 100 else ",.0f")


def _figure(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)
