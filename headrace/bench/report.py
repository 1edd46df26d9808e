"""What is shown: live progress on a terminal, a table at the end, JSON for programs."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from headrace.bench.stats import Distribution, Summary
from headrace.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from headrace.bench.load import Level, Progress


class Document(msgspec.Struct, frozen=True):
    """What `--json` writes. Times in seconds."""

    target: str
    model: str
    options: dict[str, Any]
    started: str
    levels: list[Summary]


class Live:
    """One level's progress. Call `refresh` some four times a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Bar | None = None
        self._progress: Progress | None = None

    def start(self, progress: Progress) -> None:
        self._progress = progress
        if not self._console.is_terminal:
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._bar.start()
        self._bar.add_task(describe(progress.level), total=progress.level.num_requests, figures="")

    def refresh(self) -> None:
        if self._bar is None or self._progress is None:
            return
        progress = self._progress
        elapsed_s = max(1e-9, time.perf_counter() - progress.began_at)
        figures = (
            f"{progress.in_flight} under way, {progress.num_tokens / elapsed_s:,.0f} tokens/s"
            f"{f', {progress.num_errors} errors' if progress.num_errors else ''}"
        )
        self._bar.update(self._bar.task_ids[0], completed=len(progress.samples), figures=figures)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(level: Level) -> str:
    """A level of load in words."""
    if level.mode == "closed":
        return f"{level.concurrency} client{'s' * (level.concurrency != 1)}"
    return f"{level.rate:g} requests/s"


def show(console: Console, summaries: Sequence[Summary]) -> None:
    """The tables: of each level its latencies, of several one line each."""
    for summary in summaries:
        _show_one(console, summary)
    if len(summaries) > 1:
        _show_all(console, summaries)


def write_json(path: Path, document: Document) -> None:
    """Raises StartupError."""
    data = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
    if str(path) == "-":
        sys.stdout.buffer.write(data)
        return
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StartupError(f"--json {path}: {error.strerror}") from error


def _load(summary: Summary) -> str:
    if summary.mode == "closed":
        return f"closed loop, {summary.load:g} client{'s' * (summary.load != 1)}"
    return f"open loop, {summary.load:g} requests/s"


def _show_one(console: Console, summary: Summary) -> None:
    table = Table(title=_load(summary), title_justify="left", box=None, pad_edge=False)
    table.add_column("ms")
    for name in ("mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right")
    for label, figures in (
        ("TTFT", summary.ttft_s),
        ("ITL", summary.itl_s),
        ("TPOT", summary.tpot_s),
        ("end to end", summary.latency_s),
    ):
        table.add_row(label, *_milliseconds(figures))
    console.print(table)
    console.print(
        f"{summary.succeeded} of {summary.requests} requests in {summary.duration_s:.1f} s: "
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:,.1f} tokens/s; "
        f"prompt {summary.prompt_tokens:,} tokens ({_cached(summary)} cached), output "
        f"{summary.output_tokens:,}; this client took {summary.client_cpu:.0%} of a core"
    )
    for kind, number in summary.errors.items():
        console.print(f"[red]{number} × {kind}[/]: {summary.examples.get(kind, '')}", markup=True)
    if summary.lateness_s.p99 > max(0.01, 0.1 * summary.ttft_s.p50):
        console.print(
            f"[yellow]requests were sent late (p99 {summary.lateness_s.p99 * 1000:.1f} ms): "
            "this client, or its limit of requests under way, is the bottleneck"
        )
    console.print()


def _show_all(console: Console, summaries: Sequence[Summary]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("load", "requests/s", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99", "errors"):
        table.add_column(name, justify="right")
    for summary in summaries:
        table.add_row(
            f"{summary.load:g}",
            f"{summary.requests_per_s:.2f}",
            f"{summary.output_tokens_per_s:,.0f}",
            *(_ms(s) for s in (summary.ttft_s.p50, summary.ttft_s.p99)),
            *(_ms(s) for s in (summary.itl_s.p50, summary.itl_s.p99)),
            str(summary.requests - summary.succeeded),
        )
    console.print(table)


def _cached(summary: Summary) -> str:
    return f"{summary.cached_tokens / max(1, summary.prompt_tokens):.0%}"


def _milliseconds(figures: Distribution) -> list[str]:
    if not figures.count:
        return ["–"] * 6
    values = (figures.mean, figures.p50, figures.p90, figures.p95, figures.p99, figures.max)
    return [_ms(value) for value in values]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.2f}"
