"""How a starting mesh looks: live rows on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

import click

from headrace import status

if TYPE_CHECKING:
    from headrace.status import Progress as Doing
    from headrace.supervisor.state import MeshState, ProcessState, StateDir


class Display(Protocol):
    """Shows one start. `close` it before printing anything else."""

    def update(self, mesh: MeshState) -> None:
        """The mesh as it is now; call it some ten times a second."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Leave the terminal clean. May be called again."""


def open_display(state: StateDir) -> Display:
    """The display that suits stderr."""
    return LiveDisplay(state) if sys.stderr.isatty() else PlainDisplay(state)


class PlainDisplay:
    """One line for each thing that a process comes to do."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._shown: dict[str, str] = {}

    def update(self, mesh: MeshState) -> None:
        for process in mesh.processes:
            phase = _doing(process, self._state).phase
            if process.phase != "waiting" and self._shown.get(process.name) != phase:
                self._shown[process.name] = phase
                self.say(f"{process.name}: {phase}")

    def say(self, text: str) -> None:
        click.echo(text, err=True)

    def close(self) -> None:
        pass


class LiveDisplay:
    """A row for each process, with a bar where it says how far it is."""

    def __init__(self, state: StateDir) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

        self._state = state
        self._console = Console(stderr=True)
        self._rows: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("[dim]{task.fields[phase]}", markup=True),
            console=self._console,
            transient=True,
        )
        self._progress.start()

    def update(self, mesh: MeshState) -> None:
        for process in mesh.processes:
            if process.name not in self._rows:
                self._rows[process.name] = self._progress.add_task(
                    process.name, total=None, phase=""
                )
            doing = _doing(process, self._state)
            done = 1.0 if process.phase == "ready" else doing.fraction
            self._progress.update(
                self._rows[process.name],
                total=None if done is None else 1.0,
                completed=done or 0.0,
                phase=doing.phase.replace("[", r"\["),
            )

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _doing(process: ProcessState, state: StateDir) -> Doing:
    """What a process does, in its own words where it has some."""
    if process.phase != "starting":
        return status.Progress("died" if process.phase == "dead" else process.phase)
    said = status.read(state.status(process.name))
    if said is None or said.phase == status.READY:
        return status.Progress("starting")
    if said.phase.startswith(status.FAILED):
        # Why is told once, by the supervisor.
        return status.Progress("failed")
    return said
