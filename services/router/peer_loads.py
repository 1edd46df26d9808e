"""What other routers have reserved on the workers, as they said last.

    load[w] = sum over the peers that are connected of what each said of w

A peer says what stands now, not what changed, so nothing drifts; when its stream
ends, all it said is forgotten: its gateways announce what they have elsewhere, and
workers report what runs. Pure: no stream, no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.router.reservations import Reserved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from services.router.reservations import WorkerKey

_NONE = Reserved()


class PeerLoads:
    """Loads of other routers, by router."""

    def __init__(self) -> None:
        #: Called with each worker whose load has changed.
        self.on_change: Callable[[WorkerKey], None] = lambda _: None
        self._peers: dict[str, dict[WorkerKey, Reserved]] = {}
        self._load: dict[WorkerKey, Reserved] = {}

    def load(self, worker: WorkerKey) -> Reserved:
        """What the peers have on `worker`; not to be changed or kept."""
        return self._load.get(worker, _NONE)

    def said(self, peer: str, loads: Iterable[tuple[WorkerKey, Reserved]]) -> None:
        """What `peer` has reserved on these workers now; an empty one is none."""
        told = self._peers.setdefault(peer, {})
        for worker, reserved in loads:
            self._change(worker, told.pop(worker, _NONE), -1)
            if reserved.reservations:
                told[worker] = reserved
                self._change(worker, reserved, 1)

    def forget(self, peer: str) -> None:
        """The peer's stream ended. One that is not known is ignored."""
        for worker, reserved in self._peers.pop(peer, {}).items():
            self._change(worker, reserved, -1)

    def reservations(self, peer: str) -> int:
        """How many requests the peer has in flight."""
        return sum(reserved.reservations for reserved in self._peers.get(peer, {}).values())

    def _change(self, worker: WorkerKey, reserved: Reserved, sign: int) -> None:
        if not reserved.reservations:
            return
        load = self._load.setdefault(worker, Reserved())
        load.prefill_tokens += sign * reserved.prefill_tokens
        load.blocks += sign * reserved.blocks
        load.sequences += sign * reserved.sequences
        load.reservations += sign * reserved.reservations
        if not load.reservations:
            del self._load[worker]
        self.on_change(worker)
