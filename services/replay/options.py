"""Values of the command line: lists, and workers that fail, leave, come back or join.

    --speed 1,2,4      --fail 3@60      --join 2@120

Text in, small types out; what is wrong is a `click.BadParameter` with the value in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from services.replay.simulation import FleetEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MAX_WORKERS = 100_000
MAX_SPEED = 1e6
MAX_GBPS = 1e6
#: Ten years.
MAX_SECONDS = 10 * 366 * 86_400


def names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A type for click: names out of `known`, separated by commas."""
    allowed = tuple(known)

    def convert(text: str) -> tuple[str, ...]:
        given = tuple(part.strip() for part in text.split(","))
        for name in given:
            if name not in allowed:
                raise click.BadParameter(f"{name!r} is none of {', '.join(allowed)}")
        return given

    return convert


def speeds(text: str) -> tuple[float, ...]:
    """A type for click: numbers above 0, separated by commas."""
    return tuple(_speed(part) for part in text.split(","))


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    # Not `<= 0`: that would let NaN pass.
    if not 0 < speed <= MAX_SPEED:
        raise click.BadParameter(
            f"a speed must be above 0 and at most {MAX_SPEED:,.0f}, not {text!r}"
        )
    return speed


def gbps(text: str) -> float:
    """A type for click: a bandwidth above 0, in GB/s."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # Not `<= 0`: that would let NaN pass.
    if not 0 < value <= MAX_GBPS:
        raise click.BadParameter(
            f"a bandwidth must be above 0 and at most {MAX_GBPS:,.0f} GB/s, not {text!r}"
        )
    return value


@dataclass(frozen=True, slots=True)
class At:
    """NUMBER@SECONDS, as it was given."""

    number: int
    seconds: float


def number_at(what: str, *, least: int) -> Callable[[str], At]:
    """A type for click: `what`@SECONDS, a worker's number or how many, and when."""

    def convert(text: str) -> At:
        number, _, seconds = text.partition("@")
        try:
            at = At(int(number), float(seconds))
        except ValueError:
            raise click.BadParameter(f"{text!r} must be {what}@SECONDS, two numbers") from None
        if not least <= at.number < MAX_WORKERS:
            raise click.BadParameter(
                f"{text!r}: {what} must be from {least} to {MAX_WORKERS - 1:,}"
            )
        # Not `> MAX_SECONDS`: that would let NaN pass.
        if not 0 <= at.seconds <= MAX_SECONDS:
            raise click.BadParameter(f"{text!r}: SECONDS must be from 0 to {MAX_SECONDS:,}")
        return at

    return convert


def unique(groups: Iterable[Sequence[Any]]) -> list[Any]:
    """The items of all groups, each once, in the order given."""
    return list(dict.fromkeys(item for group in groups for item in group))


def fleet_events(
    num_workers: int,
    *,
    fail: Sequence[At],
    leave: Sequence[At],
    restart: Sequence[At],
    join: Sequence[At],
) -> tuple[FleetEvent, ...]:
    """What happens to a fleet of `num_workers`, in order of time.

    `join` counts new workers, which get the next numbers; the others name one. Raises
    click.UsageError for a worker that is not there, or not gone, at that moment.
    """
    asked = [("join", at) for at in join] + [("restart", at) for at in restart]
    asked += [("leave", at) for at in leave] + [("fail", at) for at in fail]
    asked.sort(key=lambda item: item[1].seconds)
    here, known = set(range(num_workers)), num_workers
    events: list[FleetEvent] = []
    for kind, at in asked:
        if kind == "join":
            new = range(known, known + at.number)
            if new.stop > MAX_WORKERS:
                raise click.UsageError(f"--join {_text(at)}: more than {MAX_WORKERS:,} workers")
            events += [FleetEvent(at.seconds * 1000, "join", worker) for worker in new]
            here.update(new)
            known = new.stop
        elif kind == "restart":
            if at.number >= known or at.number in here:
                raise click.UsageError(
                    f"--restart {_text(at)}: worker {at.number} has not failed or left by then"
                )
            events.append(FleetEvent(at.seconds * 1000, "join", at.number))
            here.add(at.number)
        else:
            if at.number not in here:
                raise click.UsageError(
                    f"--{kind} {_text(at)}: there is no worker {at.number} then; "
                    f"the first {num_workers} are 0 to {num_workers - 1}"
                )
            events.append(
                FleetEvent(at.seconds * 1000, "fail" if kind == "fail" else "leave", at.number)
            )
            here.remove(at.number)
    return tuple(events)


def _text(at: At) -> str:
    return f"{at.number}@{at.seconds:g}"
