"""What this gateway has in flight on each worker, as it tells the router.

A router's own book lives and dies with the stream; this one lives with the
requests, and is announced again on every new stream. There is one for each router:
a reservation is in the book of the router that made it, or that took it over from
one that is gone. No wire, no clock.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from services.gateway.fleet import Worker

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Reservation:
    """One request's load on one worker; see router.proto."""

    id: int
    worker: Worker
    model: str
    prefill_tokens: int
    blocks: int
    num_sequences: int


class ReservationBook:
    """All reservations, and what the router has not been told yet."""

    def __init__(self) -> None:
        self._open: dict[int, Reservation] = {}
        self._load: Counter[str] = Counter()
        self._adopted: list[int] = []
        self._prefilled: list[int] = []
        self._released: list[int] = []

    @property
    def load(self) -> Mapping[str, int]:
        """Sequences in flight by worker id."""
        return self._load

    @property
    def has_updates(self) -> bool:
        return bool(self._adopted or self._prefilled or self._released)

    def add(self, reservation: Reservation) -> None:
        self._open[reservation.id] = reservation
        self._load[reservation.worker.worker_id] += reservation.num_sequences

    def adopt(self, reservation: Reservation) -> None:
        """`add` one that this router did not make, and must be told of."""
        self.add(reservation)
        self._adopted.append(reservation.id)

    def hand_over(self) -> list[Reservation]:
        """All reservations, for another router's book. This one's router, if it lives, is told."""
        reservations = list(self._open.values())
        for reservation in reservations:
            self.release(reservation.id)
        return reservations

    def prefill_done(self, reservation_id: int) -> None:
        """The first token came. Repeating it changes nothing."""
        reservation = self._open.get(reservation_id)
        if reservation is None or reservation.prefill_tokens == 0:
            return
        self._open[reservation_id] = replace(reservation, prefill_tokens=0)
        self._prefilled.append(reservation_id)

    def release(self, reservation_id: int) -> None:
        """It is over. Repeating it changes nothing."""
        reservation = self._open.pop(reservation_id, None)
        if reservation is None:
            return
        worker_id = reservation.worker.worker_id
        self._load[worker_id] -= reservation.num_sequences
        if self._load[worker_id] <= 0:
            del self._load[worker_id]
        self._released.append(reservation_id)

    def disown(self, reservation_id: int) -> None:
        """A call was given up: the router may have reserved for it, and must not keep that."""
        self._released.append(reservation_id)

    def announce(self) -> list[Reservation]:
        """All that a new stream must be told; it makes the updates that waited obsolete."""
        self._adopted.clear()
        self._prefilled.clear()
        self._released.clear()
        return list(self._open.values())

    def take_adopted(self, limit: int) -> list[Reservation]:
        """At most `limit` reservations to be told of; told before any updates of them."""
        ids, self._adopted = self._adopted[:limit], self._adopted[limit:]
        return [self._open[number] for number in ids if number in self._open]

    def take_updates(self, limit: int) -> tuple[list[int], list[int]]:
        """At most `limit` ids each whose prefill is done, and which are released."""
        prefilled, self._prefilled = self._prefilled[:limit], self._prefilled[limit:]
        released, self._released = self._released[:limit], self._released[limit:]
        return prefilled, released
