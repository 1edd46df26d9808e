"""The less loaded of two workers drawn by the request's turn.

Among many workers nearly as good as looking at all (Mitzenmacher, "The Power of Two
Choices in Randomized Load Balancing", 2001), and routers that do not know each
other's load do not herd: they seldom draw the same two.
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

if TYPE_CHECKING:
    from collections.abc import Sequence

#: SplitMix64's, so that successive turns draw unrelated pairs.
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


class PowerOfTwo:
    """See the module's docstring."""

    name = "power_of_two"

    def choose(self, request: RoutingRequest, candidates: Sequence[Candidate]) -> Choice | None:
        """See Policy."""
        pool = eligible(request, candidates)
        if not pool:
            return None
        drawn = _mix(request.turn)
        first = request.turn % len(pool)
        # Another one, unless there is none.
        second = (first + 1 + drawn % max(1, len(pool) - 1)) % len(pool)
        one, other = pool[first], pool[second]
        return choice(request, one if _burden(one) <= _burden(other) else other)

    def explain(
        self, request: RoutingRequest, candidates: Sequence[Candidate]
    ) -> list[dict[str, float]]:
        """See Policy."""
        return explain_ttft(request, candidates)


def _mix(turn: int) -> int:
    mixed = (turn + 1) * _GOLDEN & _MASK
    mixed = (mixed ^ (mixed >> 30)) * _MIX_1 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * _MIX_2 & _MASK
    return mixed ^ (mixed >> 31)


def _burden(candidate: Candidate) -> tuple[int, int]:
    return (candidate.load.sequences, candidate.load.prefill_tokens)
