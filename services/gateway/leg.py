"""A request's stay on one worker, as the router counts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.gateway.fleet import Plan
    from services.gateway.peers import RouterPeer


class Leg:
    """One plan's reservation, shared by the `num_sequences` that go where it says.

    The router hears of the first token once, and of the end once.
    """

    __slots__ = ("_num_sequences", "_prefilled", "_router", "plan")

    def __init__(self, router: RouterPeer, plan: Plan, num_sequences: int) -> None:
        self.plan = plan
        self._router = router
        self._num_sequences = num_sequences
        self._prefilled = False

    def first_token(self) -> None:
        """A sequence got its first token there."""
        if not self._prefilled:
            self._prefilled = True
            self._router.prefill_done(self.plan.reservation_id)

    def leave(self) -> None:
        """A sequence is off that worker, however it ended. Call it once for each."""
        self._num_sequences -= 1
        if self._num_sequences == 0:
            self._router.release(self.plan.reservation_id)
