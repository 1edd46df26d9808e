"""The worker where the request costs the fewest predicted milliseconds.

    total = TTFT + CROWDING_WEIGHT · sequences · step + STALL_WEIGHT · sequences · prefill

- TTFT: the queue ahead, the prefill of the tokens that are not cached there, one
  step. A cached prefix draws a request to its worker; the queue there drives it
  away again, so no worker idles while another's queue is longer than the prefill
  that the cache would save.
- Crowding: the request will share its steps with the sequences there. Without
  this term, cached prompts with long answers would pile onto one worker.
- Stall: each sequence there waits while this request's prefill computes.

Both weights say how many milliseconds of others' inter-token latency equal one of
this request's TTFT. They are a choice, to be tuned by replay.

Totals closer than `TIE` are equal, since the estimates are no better: then the
less loaded worker is taken, then the one that holds more, then the next in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.router.policies.base import Candidate, Choice, RoutingRequest, eligible

if TYPE_CHECKING:
    from collections.abc import Sequence

CROWDING_WEIGHT = 0.5
STALL_WEIGHT = 0.05

#: Relative; what the calibration of two equal workers differs by.
TIE = 0.05


class Kv:
    """See the module's docstring."""

    name = "kv"

    def choose(self, request: RoutingRequest, candidates: Sequence[Candidate]) -> Choice | None:
        """See Policy."""
        pool = eligible(request, candidates)
        if not pool:
            return None
        totals = [_total_ms(request, candidate) for candidate in pool]
        limit = min(totals) * (1 + TIE)
        close = [c for c, total in zip(pool, totals, strict=True) if total <= limit]
        best = min(map(_burden, close))
        tied = [c for c in close if _burden(c) == best]
        candidate = tied[request.turn % len(tied)]
        return Choice(candidate, candidate.predicted_ttft_ms(request.num_tokens))


def _total_ms(request: RoutingRequest, candidate: Candidate) -> float:
    timing = candidate.timing
    matched = candidate.matched_tokens
    prefill = timing.prefill_ms(request.num_tokens - matched, matched)
    queue = timing.prefill_ms(candidate.load.prefill_tokens)
    sequences = candidate.load.sequences
    crowding = CROWDING_WEIGHT * sequences * timing.decode_step_ms
    stall = STALL_WEIGHT * sequences * prefill
    return queue + prefill + timing.decode_step_ms + crowding + stall


def _burden(candidate: Candidate) -> tuple[int, int, int]:
    load = candidate.load
    return (load.sequences, load.prefill_tokens, -candidate.matched_tokens)
