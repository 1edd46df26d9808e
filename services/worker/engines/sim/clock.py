"""Time for the sim engine: real, or virtual for replays."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that never go back, and a way to let them pass."""

    #: What happens in this many seconds between two steps takes no time of the second.
    slack: float

    def now(self) -> float:
        """Seconds since some fixed moment."""

    def wait_until(self, moment: float) -> None:
        """Return when `now()` is at least `moment`."""


class RealClock:
    """The machine's monotonic clock; waiting sleeps."""

    # Streams and scheduling around a step; a longer gap was idleness.
    slack = 0.002

    def now(self) -> float:
        """See Clock.now."""
        return time.monotonic()

    def wait_until(self, moment: float) -> None:
        """See Clock.wait_until."""
        while (left := moment - time.monotonic()) > 0:
            time.sleep(left)


class VirtualClock:
    """A clock that moves only when someone waits; waiting takes no time."""

    slack = 0.0

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """See Clock.now."""
        return self._now

    def wait_until(self, moment: float) -> None:
        """See Clock.wait_until."""
        self._now = max(self._now, moment)
