"""Requests that wait because every worker of their model has all it can run.

A line per model, ordered by priority (higher first), then deadline, then arrival. It is
bounded: beyond the limit the request of the lowest priority is refused, the new one
if none is lower. A request whose deadline passes, or will have passed before its turn
comes at the speed at which the line moves, is refused instead of waiting for nothing.

    a waiter is in its line      until it is placed, refused, cancelled or forgotten
    an unclaimed waiter          its gateway's stream was lost: it keeps its place for the
                                 grace, is not placed, and counts again once it is repeated

Decides who is next, and nothing else: whether there is room, and where, is the core's.
Pure: the clock is handed in, in seconds.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from headrace.errors import DeadlineExceeded, ResourceExhausted
from services.router.block_table import Ids
from services.router.policies import RoutingRequest

#: Requests that may wait at one router, unless it is told otherwise.
MAX_WAITING = 1024
#: And block ids of their prompts together: 64 MB.
MAX_WAITING_IDS = 1 << 22
#: From so many placements on the line's speed is believed; it is that of the last ones.
_MIN_PLACED, _MAX_PLACED = 4, 64
#: Bounds of what is told a refused client; the lower where the speed is not known.
MIN_RETRY_MS, UNKNOWN_RETRY_MS, MAX_RETRY_MS = 100, 1000, 30_000


@dataclass(slots=True, eq=False)
class Waiter:
    """One request that waits. Times are in seconds of the caller's clock."""

    gateway_id: str
    request_id: int
    model: str
    block_ids: Ids | Sequence[int]
    request: RoutingRequest
    arrived: float
    #: infinity: none.
    deadline: float
    #: When its gateway's stream was lost, and nobody has asked for it since.
    unclaimed_since: float | None = None
    #: Given by `Waiting.add`; the last of it is nobody else's.
    order: tuple[float, float, int] = (0.0, 0.0, 0)

    def __lt__(self, other: Waiter) -> bool:
        return self.order < other.order


@dataclass(slots=True)
class _Line:
    """One model's waiters in order, and when the last of them were placed."""

    waiters: list[Waiter] = field(default_factory=list)
    placed: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_PLACED))

    def per_s(self, now: float) -> float:
        """Requests placed per second lately; 0: not known."""
        if len(self.placed) < _MIN_PLACED:
            return 0.0
        took = now - self.placed[0]
        return (len(self.placed) - 1) / took if took > 0 else 0.0


class QueueState(NamedTuple):
    """One model's line. `per_s` and `wait_s` are 0 while not known."""

    waiting: int
    #: Of all lines together.
    limit: int
    per_s: float
    #: Until the turn of one that comes now.
    wait_s: float


class Waiting:
    """All lines of one router."""

    def __init__(self, limit: int = MAX_WAITING) -> None:
        self.limit = limit
        self._lines: dict[str, _Line] = {}
        self._waiters: dict[tuple[str, int], Waiter] = {}
        #: By deadline, those that have one.
        self._deadlines: list[tuple[float, int, Waiter]] = []
        self._numbers = itertools.count()
        self._num_ids = 0

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def models(self) -> list[str]:
        """Those for which somebody waits."""
        return list(self._lines)

    def has_line(self, model: str) -> bool:
        """Whether somebody waits for the model."""
        return model in self._lines

    def line(self, model: str) -> list[Waiter]:
        """Who waits for the model, in order; a copy."""
        line = self._lines.get(model)
        return list(line.waiters) if line else []

    def find(self, gateway_id: str, request_id: int) -> Waiter | None:
        """The waiter of that name."""
        return self._waiters.get((gateway_id, request_id))

    def add(self, waiter: Waiter, now: float) -> Waiter | None:
        """It waits from now on. Returns who must be refused in its stead, already removed.

        Raises ResourceExhausted beyond the limit, DeadlineExceeded if it can't be its
        turn in time.
        """
        waiter.order = (-waiter.request.priority, waiter.deadline, next(self._numbers))
        wait_s = self.wait_s(waiter, now)
        if now + wait_s >= waiter.deadline:
            raise DeadlineExceeded(
                f"{self.ahead(waiter)} requests wait for model {waiter.model!r} before this one, "
                f"about {wait_s:.1f} s; it has {max(0.0, waiter.deadline - now):.1f} s left"
            )
        displaced = self._make_room(waiter, now)
        line = self._lines.setdefault(waiter.model, _Line())
        insort(line.waiters, waiter)
        self._waiters[waiter.gateway_id, waiter.request_id] = waiter
        self._num_ids += len(waiter.block_ids)
        if waiter.deadline < math.inf:
            insort(self._deadlines, _deadline(waiter))
        return displaced

    def placed(self, waiter: Waiter, now: float) -> None:
        """It got its worker."""
        self._lines[waiter.model].placed.append(now)
        self.remove(waiter)

    def remove(self, waiter: Waiter) -> None:
        """It waits no more, for whatever reason."""
        del self._waiters[waiter.gateway_id, waiter.request_id]
        self._num_ids -= len(waiter.block_ids)
        if waiter.deadline < math.inf:
            del self._deadlines[bisect_left(self._deadlines, _deadline(waiter))]
        line = self._lines[waiter.model]
        del line.waiters[bisect_left(line.waiters, waiter)]
        if not line.waiters:
            # How fast a line moved that nobody waited in says nothing of the next.
            del self._lines[waiter.model]

    def overdue(self, now: float) -> list[Waiter]:
        """Those whose deadline has passed, the earliest first; they stay until removed."""
        return [
            waiter for _, _, waiter in takewhile(lambda entry: entry[0] <= now, self._deadlines)
        ]

    @property
    def next_deadline(self) -> float:
        """Of anybody who waits; infinity: nobody has one."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def lost(self, gateway_id: str, now: float) -> None:
        """The gateway's stream ended, or another begins: who does not ask again is forgotten."""
        for waiter in self._waiters.values():
            if waiter.gateway_id == gateway_id and waiter.unclaimed_since is None:
                waiter.unclaimed_since = now

    def expire(self, now: float, grace_s: float) -> None:
        """Forget those that nobody asked for during the grace."""
        for waiter in list(self._waiters.values()):
            since = waiter.unclaimed_since
            if since is not None and now - since >= grace_s:
                self.remove(waiter)

    def ahead(self, waiter: Waiter) -> int:
        """How many come before it, whether it waits or would."""
        line = self._lines.get(waiter.model)
        return bisect_left(line.waiters, waiter) if line else 0

    def per_s(self, model: str, now: float) -> float:
        """Requests of the model's line that are placed per second; 0: not known."""
        line = self._lines.get(model)
        return line.per_s(now) if line else 0.0

    def wait_s(self, waiter: Waiter, now: float) -> float:
        """How long until its turn, about; 0: not known."""
        per_s = self.per_s(waiter.model, now)
        return (self.ahead(waiter) + 1) / per_s if per_s else 0.0

    def state(self, model: str, now: float, ahead: int | None = None) -> QueueState:
        """The model's line, for one that comes behind `ahead` others, or behind all."""
        line = self._lines.get(model)
        if line is None:
            return QueueState(0, self.limit, 0.0, 0.0)
        per_s = line.per_s(now)
        before = len(line.waiters) if ahead is None else ahead
        wait_s = (before + 1) / per_s if per_s else 0.0
        return QueueState(len(line.waiters), self.limit, per_s, wait_s)

    def retry_after_ms(self, model: str, now: float) -> int:
        """When one that was refused should come again: once the line that is there has gone."""
        per_s = self.per_s(model, now)
        if not per_s:
            return UNKNOWN_RETRY_MS
        wait_ms = len(self._lines[model].waiters) / per_s * 1000
        return int(min(max(wait_ms, MIN_RETRY_MS), MAX_RETRY_MS))

    def refusal(self, model: str, now: float) -> ResourceExhausted:
        """What one is told that can't wait here."""
        return ResourceExhausted(
            f"every worker of model {model!r} is busy, and {len(self)} requests wait "
            f"already (limit {self.limit})",
            retry_after_ms=self.retry_after_ms(model, now),
        )

    def _make_room(self, waiter: Waiter, now: float) -> Waiter | None:
        """Room for one more; the last of its line goes if its priority is lower."""
        fits = self._num_ids + len(waiter.block_ids) <= MAX_WAITING_IDS
        if len(self) < self.limit and fits:
            return None
        line = self._lines.get(waiter.model)
        last = line.waiters[-1] if line else None
        if last is None or last.request.priority >= waiter.request.priority:
            raise self.refusal(waiter.model, now)
        if not fits and len(last.block_ids) < len(waiter.block_ids):
            raise self.refusal(waiter.model, now)
        self.remove(last)
        return last


def _deadline(waiter: Waiter) -> tuple[float, int, Waiter]:
    """As it stands among the deadlines: numbers differ, so that waiters are not compared."""
    return waiter.deadline, waiter.order[2], waiter
