"""`headrace down`: stop a mesh of this machine."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from headrace.cli.state import state_dir_option
from headrace.errors import StartupError

if TYPE_CHECKING:
    from headrace.supervisor import StateDir

_POLL_S = 0.05
_KILL_S = 10.0


@click.command()
@click.option(
    "--timeout",
    default=75.0,
    show_default=True,
    metavar="SECONDS",
    help="How long requests in flight may take before everything is killed.",
)
@state_dir_option
def down(timeout: float, state: StateDir) -> None:
    """Stop the mesh: requests in flight are finished first.

    \b
    headrace down
    headrace down --timeout 0      stop at once
    """
    from headrace.supervisor import is_running

    mesh = state.read()
    if mesh is None or not is_running(mesh):
        state.clear()
        click.echo(f"No mesh runs with the state directory {state.root}.")
        return
    _signal(mesh.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while is_running(mesh):
        time.sleep(_POLL_S)
        late = time.monotonic() - deadline
        if late > _KILL_S:
            raise StartupError(
                f"the supervisor (pid {mesh.pid}) does not stop; see {state.log('supervisor')}"
            )
        if late > 0:
            # Again means: at once.
            _signal(mesh.pid, signal.SIGTERM)
    click.echo("Stopped.")


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
