"""The option that says which mesh is meant, shared by the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headrace.supervisor.state import StateDir, default_state_dir

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_GRPC = "127.0.0.1:50051"
DEFAULT_HTTP = "127.0.0.1:8080"


def state_dir_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--state-dir`; the command gets `state`, a StateDir."""
    return click.option(
        "--state-dir",
        "state",
        metavar="DIR",
        type=click.Path(file_okay=False, path_type=Path),
        callback=lambda _ctx, _param, path: StateDir((path or default_state_dir()).absolute()),
        help="Where the mesh keeps its logs and state; one mesh each. "
        "[$HEADRACE_STATE, or ~/.local/state/headrace]",
    )(command)
