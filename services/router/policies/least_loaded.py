"""The worker with the fewest sequences, whatever it holds; then the shortest queue."""

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


class LeastLoaded:
    """See the module's docstring."""

    name = "least_loaded"

    def choose(self, request: RoutingRequest, candidates: Sequence[Candidate]) -> Choice | None:
        """See Policy."""
        pool = eligible(request, candidates)
        if not pool:
            return None
        least = min((c.load.sequences, c.load.prefill_tokens) for c in pool)
        tied = [c for c in pool if (c.load.sequences, c.load.prefill_tokens) == least]
        return choice(request, tied[request.turn % len(tied)])

    def explain(
        self, request: RoutingRequest, candidates: Sequence[Candidate]
    ) -> list[dict[str, float]]:
        """See Policy."""
        return explain_ttft(request, candidates)
