"""What to do when a process dies, and in which order things start and stop. Pure.

    starting ──ready──▶ ready ──died──▶ waiting ──delay──▶ starting
        └──────died─────────────────────▲ │
                                          └─▶ given up (only before the mesh was ready)

A process that can't start is given up only while the mesh comes up, when a person
waits for an answer; later it is tried again for as long as it takes, since what
it lacks may come back. No clock, no process is touched here.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from typing import Literal, get_args

from headrace.service import EXIT_CONFIG

Role = Literal["valkey", "tokenizer", "router", "worker", "gateway"]

#: What starts together; a group waits until all of the one before are ready.
START_ORDER: tuple[frozenset[Role], ...] = (
    frozenset({"valkey"}),
    frozenset({"tokenizer", "router", "worker", "gateway"}),
)
#: What is stopped together, and how many seconds it has to drain before it is killed:
#: first what takes requests in, last what the others write to.
STOP_ORDER: tuple[tuple[Role, float], ...] = (
    ("gateway", 35.0),
    ("worker", 15.0),
    ("router", 5.0),
    ("tokenizer", 5.0),
    ("valkey", 5.0),
)
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Seconds before the first restart, at most, and of health after which deaths are
    forgotten; deaths in a row that end a start."""

    first_delay_s: float = 0.1
    max_delay_s: float = 10.0
    healthy_s: float = 30.0
    max_start_deaths: int = 3


@dataclass(frozen=True, slots=True)
class History:
    """One process so far. `ready_since` is None while it is not ready."""

    deaths_in_a_row: int = 0
    restarts: int = 0
    ready_since: float | None = None

    def ready(self, now: float) -> History:
        """It serves."""
        return replace(self, ready_since=now)


@dataclass(frozen=True, slots=True)
class Restart:
    """Start it again in `delay_s`."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It won't start: end everything."""


def on_death(
    history: History,
    status: int,
    now: float,
    *,
    mesh_was_ready: bool,
    policy: RestartPolicy,
) -> tuple[History, Restart | GiveUp]:
    """What to do with a process that died with `status` (negative: by that signal)."""
    since = history.ready_since
    healthy = since is not None and now - since >= policy.healthy_s
    deaths = 1 if healthy else history.deaths_in_a_row + 1
    dead = History(deaths, history.restarts, None)
    if not mesh_was_ready and (status == EXIT_CONFIG or deaths >= policy.max_start_deaths):
        return dead, GiveUp()
    delay = min(policy.first_delay_s * 2 ** min(deaths - 1, 32), policy.max_delay_s)
    return replace(dead, restarts=history.restarts + 1), Restart(delay)


def describe_exit(status: int) -> str:
    """`exit status 1`, or `SIGKILL`."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
