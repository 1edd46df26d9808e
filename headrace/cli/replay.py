"""`headrace replay`: hands over to the replay service's own command.

Options and help live there: this package imports no service.
"""

from __future__ import annotations

import os
import sys

import click


@click.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
    },
    add_help_option=False,
    short_help="Replay a trace through a simulated fleet: plan capacity, compare policies.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def replay(arguments: tuple[str, ...]) -> None:
    """Replay a trace through a simulated fleet; see `headrace replay --help`."""
    sys.stdout.flush()
    sys.stderr.flush()
    # In our place, so that signals, output and exit status are its own.
    os.execve(
        sys.executable,
        [sys.executable, "-P", "-m", "services.replay", *arguments],
        {**os.environ, "HEADRACE_REPLAY_NAME": "headrace replay"},
    )
