"""How far replays are, on stderr: bars on a terminal, a line for each run elsewhere."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from services.replay.runs import label

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from services.replay.runs import Progress
    from services.replay.simulation import SimulationConfig
    from services.replay.workload import Trace


@contextmanager
def open_progress(trace: Trace, configs: Sequence[SimulationConfig]) -> Iterator[Progress]:
    """Yields what `run_all` reports to."""
    if sys.stderr.isatty():
        with _bars(trace, configs) as progress:
            yield progress
    else:
        yield _lines(configs)


def _lines(configs: Sequence[SimulationConfig]) -> Progress:
    done: set[int] = set()

    def progress(run: int, ended: int, of: int) -> None:
        if ended == of and run not in done:
            done.add(run)
            click.echo(f"{label(configs[run])}: {of:,} requests replayed", err=True)

    return progress


@contextmanager
def _bars(trace: Trace, configs: Sequence[SimulationConfig]) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("requests, at [cyan]{task.fields[at]}[/] · took"),
        TimeElapsedColumn(),
        TextColumn("· left"),
        TimeRemainingColumn(),
    )
    total = len(trace.requests)
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        rows = [
            bars.add_task(label(config), total=total, at=clock(0.0), start=False)
            for config in configs
        ]
        begun: set[int] = set()

        def progress(run: int, ended: int, of: int) -> None:
            if run not in begun:
                begun.add(run)
                bars.start_task(rows[run])
            # By arrivals: where requests wait long, the replay's clock is further.
            reached = trace.requests[min(ended, of - 1)].arrival_ms / configs[run].speed
            bars.update(rows[run], completed=ended, at=clock(reached))

        yield progress


def clock(ms: float) -> str:
    """`ms` as h:mm:ss."""
    seconds = int(ms / 1000)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
