"""Reservations that their worker's last report can't have counted yet.

    router ── reserved ──▶ gateway ── submitted ──▶ worker ── report ──▶ router

A report says what is really left to compute, but is late by those hops, and as old as
the time since. What was reserved in between must be added to it: the newest
reservations, as many as the worker has fewer sequences than are reserved. Those whose
end is still under way count among the missing for that long: then a few more are added
than should be, and a report later no more.

Pure: no clock, no worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.router.reservations import Reservation, WorkerKey


class Unreported:
    """By worker, in the order in which they were reserved."""

    def __init__(self) -> None:
        #: By identity: equal reservations are not the same.
        self._newest: dict[WorkerKey, dict[int, Reservation]] = {}

    def add(self, reservation: Reservation) -> None:
        """It was made now."""
        self._newest.setdefault(reservation.worker, {})[id(reservation)] = reservation

    def remove(self, reservation: Reservation) -> None:
        """It ended, reported or not."""
        newest = self._newest.get(reservation.worker)
        if newest and newest.pop(id(reservation), None) and not newest:
            del self._newest[reservation.worker]

    def reported(self, worker: WorkerKey, num_missing: int) -> None:
        """The worker has `num_missing` sequences fewer than are reserved."""
        newest = self._newest.get(worker)
        if not newest:
            return
        kept = 0
        for known in reversed(list(newest.values())):
            if kept < num_missing:
                kept += known.sequences
            else:
                del newest[id(known)]
        if not newest:
            del self._newest[worker]

    def prefill_tokens(self, worker: WorkerKey) -> int:
        """Prompt tokens of those on the worker."""
        newest = self._newest.get(worker)
        return sum(known.prefill_tokens for known in newest.values()) if newest else 0

    def __len__(self) -> int:
        return sum(map(len, self._newest.values()))
