"""Prompts that begin alike go to one worker, by hash: no KV events are needed.

For engines that do not publish what they hold. The first blocks decide; a worker
above its share of the load passes requests on (see rendezvous). A prompt shorter
than a block goes to the least loaded worker.
"""

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
from services.router.policies.least_loaded import LeastLoaded
from services.router.policies.rendezvous import owner

if TYPE_CHECKING:
    from collections.abc import Sequence


class PrefixHash:
    """See the module's docstring."""

    name = "prefix_hash"

    def choose(self, request: RoutingRequest, candidates: Sequence[Candidate]) -> Choice | None:
        """See Policy."""
        if not request.prefix_hash:
            return LeastLoaded().choose(request, candidates)
        pool = eligible(request, candidates)
        if not pool:
            return None
        key = request.prefix_hash.to_bytes(16, "little", signed=True)
        return choice(request, owner(key, pool))

    def explain(
        self, request: RoutingRequest, candidates: Sequence[Candidate]
    ) -> list[dict[str, float]]:
        """See Policy."""
        return explain_ttft(request, candidates)
