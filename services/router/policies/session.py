"""Requests of one session go to one worker; those without a session to the least loaded.

A session's worker is found by hash, so routers agree on it without talking, and a
worker above its share of the load passes requests on (see rendezvous).
"""

from __future__ import annotations

from hashlib import blake2b
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


class Session:
    """See the module's docstring."""

    name = "session"

    def choose(self, request: RoutingRequest, candidates: Sequence[Candidate]) -> Choice | None:
        """See Policy."""
        if not request.session_id:
            return LeastLoaded().choose(request, candidates)
        pool = eligible(request, candidates)
        if not pool:
            return None
        # BLAKE2 takes keys of up to 64 bytes, and a tenant's session is not another's.
        name = f"{request.tenant}\0{request.session_id}".encode(errors="surrogatepass")
        key = blake2b(name, digest_size=16).digest()
        return choice(request, owner(key, pool))

    def explain(
        self, request: RoutingRequest, candidates: Sequence[Candidate]
    ) -> list[dict[str, float]]:
        """See Policy."""
        return explain_ttft(request, candidates)
