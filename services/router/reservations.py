"""Load that was sent and not yet reported: one reservation per request in flight.

A reservation belongs to a gateway's stream and to a worker's generation, and
ends with the first of: the gateway's release, the gateway's stream (after a
grace, in which it may come back and announce what it has), the generation.

    load[w] = sum over all reservations of w

holds at every step: a reservation takes away exactly what it added, so no load
leaks and none is negative. Pure: the clock is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from headrace.errors import ResourceExhausted
from services.router.coming import Coming
from services.router.unreported import Unreported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: How long a gateway's reservations outlive its stream, for a reconnect.
GRACE_S = 2.0
#: Reservations that one gateway may hold.
MAX_PER_GATEWAY = 65_536


class WorkerKey(NamedTuple):
    """One generation of one worker."""

    worker_id: str
    generation: int


@dataclass(slots=True)
class Reservation:
    """One request's load on one worker. `prefill_tokens` falls to 0 at its first token."""

    worker: WorkerKey
    prefill_tokens: int
    blocks: int
    sequences: int
    #: Ids of the prompt's blocks that were not cached there (see `Coming`).
    coming: Sequence[int] = ()


@dataclass(slots=True)
class Reserved:
    """What is reserved on one worker."""

    prefill_tokens: int = 0
    blocks: int = 0
    sequences: int = 0
    reservations: int = 0


@dataclass(slots=True)
class _Gateway:
    connection: object
    lost_at: float | None = None
    reservations: dict[int, Reservation] = field(default_factory=dict)


_NONE = Reserved()


class LoadChanges:
    """The workers whose load changed since somebody took them. `on_first`: there is one."""

    def __init__(self, workers: Iterable[WorkerKey], on_first: Callable[[], None]) -> None:
        self._workers = set(workers)
        self._on_first = on_first

    def add(self, worker: WorkerKey) -> None:
        """The worker's load changed."""
        if not self._workers:
            self._on_first()
        self._workers.add(worker)

    def take(self) -> set[WorkerKey]:
        """All of them; they are not told of again until they change again."""
        workers, self._workers = self._workers, set()
        return workers


class Reservations:
    """All requests in flight, by gateway."""

    def __init__(self) -> None:
        #: What the prompts in flight will have computed where.
        self.coming = Coming()
        self.unreported = Unreported()
        #: Called with each worker whose load has changed.
        self.on_change: Callable[[WorkerKey], None] = lambda _: None
        self._followers: set[LoadChanges] = set()
        self._gateways: dict[str, _Gateway] = {}
        self._load: dict[WorkerKey, Reserved] = {}

    def __len__(self) -> int:
        return sum(len(gateway.reservations) for gateway in self._gateways.values())

    def load(self, worker: WorkerKey) -> Reserved:
        """What is reserved on `worker`; not to be changed or kept."""
        return self._load.get(worker, _NONE)

    def follow(self, on_first: Callable[[], None]) -> LoadChanges:
        """Be told of changes, beginning with every worker that has load now, until `unfollow`."""
        changes = LoadChanges(self._load, on_first)
        self._followers.add(changes)
        return changes

    def unfollow(self, changes: LoadChanges) -> None:
        """The follower is gone."""
        self._followers.discard(changes)

    def open(
        self, gateway_id: str, connection: object, announced: Iterable[tuple[int, Reservation]]
    ) -> None:
        """The gateway's stream is `connection` now, and it has `announced` in flight: no more.

        Raises ResourceExhausted if that is too much.
        """
        known = self._gateways.pop(gateway_id, None)
        before = known.reservations if known else {}
        coming = {number: (old.worker, old.coming) for number, old in before.items()}
        for old in before.values():
            self._subtract(old)
        self._gateways[gateway_id] = _Gateway(connection)
        for request_id, reservation in announced:
            worker, ids = coming.get(request_id, (None, ()))
            if worker == reservation.worker:
                # A gateway does not announce which blocks they were.
                reservation.coming = ids
            self.reserve(gateway_id, request_id, reservation)

    def lost(self, gateway_id: str, connection: object, now: float) -> bool:
        """The stream `connection` ended. One that another has replaced is of no concern: False."""
        gateway = self._gateways.get(gateway_id)
        if gateway is None or gateway.connection is not connection:
            return False
        gateway.lost_at = now
        return True

    def expire(self, now: float) -> None:
        """Forget gateways lost for longer than the grace."""
        for gateway_id, gateway in list(self._gateways.items()):
            if gateway.lost_at is not None and now - gateway.lost_at >= GRACE_S:
                for reservation in gateway.reservations.values():
                    self._subtract(reservation)
                del self._gateways[gateway_id]

    def reserve(self, gateway_id: str, request_id: int, reservation: Reservation) -> None:
        """Add a reservation; one under the same id is replaced (the call was repeated).

        Raises KeyError for a gateway that did not open, ResourceExhausted.
        """
        held = self._gateways[gateway_id].reservations
        self.release(gateway_id, request_id)
        if len(held) >= MAX_PER_GATEWAY:
            raise ResourceExhausted(
                f"gateway {gateway_id!r} has {len(held)} requests in flight "
                f"(limit {MAX_PER_GATEWAY})",
                retry_after_ms=1000,
            )
        held[request_id] = reservation
        load = self._load.get(reservation.worker)
        if load is None:
            load = self._load[reservation.worker] = Reserved()
        load.prefill_tokens += reservation.prefill_tokens
        load.blocks += reservation.blocks
        load.sequences += reservation.sequences
        load.reservations += 1
        self.unreported.add(reservation)
        if reservation.coming and not self.coming.add(reservation.worker, reservation.coming):
            reservation.coming = ()
        self._changed(reservation.worker)

    def prefill_done(self, gateway_id: str, request_id: int) -> None:
        """The request's prompt is computed. Unknown ids are ignored: they ended already."""
        gateway = self._gateways.get(gateway_id)
        reservation = gateway.reservations.get(request_id) if gateway else None
        if reservation is not None:
            self._load[reservation.worker].prefill_tokens -= reservation.prefill_tokens
            reservation.prefill_tokens = 0
            self._changed(reservation.worker)

    def release(self, gateway_id: str, request_id: int) -> None:
        """The request is over. Unknown ids are ignored."""
        gateway = self._gateways.get(gateway_id)
        reservation = gateway.reservations.pop(request_id, None) if gateway else None
        if reservation is not None:
            self._subtract(reservation)

    def drop_worker(self, worker: WorkerKey) -> None:
        """That generation of the worker is over, and what ran there with it."""
        if worker not in self._load:
            return
        for gateway in self._gateways.values():
            ended = [i for i, r in gateway.reservations.items() if r.worker == worker]
            for request_id in ended:
                self._subtract(gateway.reservations.pop(request_id))

    def _changed(self, worker: WorkerKey) -> None:
        self.on_change(worker)
        for follower in self._followers:
            follower.add(worker)

    def _subtract(self, reservation: Reservation) -> None:
        if reservation.coming:
            self.coming.remove(reservation.worker, reservation.coming)
            reservation.coming = ()
        self.unreported.remove(reservation)
        self._changed(reservation.worker)
        load = self._load[reservation.worker]
        load.reservations -= 1
        if not load.reservations:
            del self._load[reservation.worker]
            return
        load.prefill_tokens -= reservation.prefill_tokens
        load.blocks -= reservation.blocks
        load.sequences -= reservation.sequences
