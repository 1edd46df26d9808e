"""Each worker in turn, whatever it holds and does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.router.policies.base import (
    Candidate,
    Choice,
    RoutingRequest,
    choice,
    eligible,
    explain_ttft,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class RoundRobin:
    """See the module's docstring."""

    name = "round_robin"

    def choose(self, request: RoutingRequest, candidates: Sequence[Candidate]) -> Choice | None:
        """See Policy."""
        pool = eligible(request, candidates)
        if not pool:
            return None
        return choice(request, pool[request.turn % len(pool)])

    def explain(
        self, request: RoutingRequest, candidates: Sequence[Candidate]
    ) -> list[dict[str, float]]:
        """See Policy."""
        return explain_ttft(request, candidates)
