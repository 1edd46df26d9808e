"""The worker where the request costs the fewest predicted milliseconds, its own and others'.

    total = queue + transfer + prefill + step       its predicted time to first token
          + stall     what its prefill costs those that run there, and those that come
          + pace      what its tokens will take there, after the first
          + late      an objective of its that would be missed

- A cached prefix draws a request to its worker by the prefill that it saves; the queue
  there drives it away again, so no worker idles while another's queue is longer than
  what the cache would save. A prefix that gets hot is thereby computed once more
  where there is time for it. Tokens that earlier prompts will have computed by then
  count as cached: a burst of siblings follows its first member until its queue is as
  long as computing their prefix elsewhere.
- Stall: `STALL_WEIGHT` times the prefill. Work that the cache saves is worth more than
  its milliseconds, since all who run there, and all who come, wait for it; and it
  keeps a burst of siblings from computing their prefix on all workers at once. It
  does not grow with the sequences there: then it would outweigh any queue, and
  requests would crowd where few run.
- Pace: `PACE_WEIGHT` of the decode steps that it will take part in, as long as they are
  there with it. Without it, prompts that share a prefix pile onto one worker whose
  queue is short but whose steps are slow.
- Late: a worker that meets the deadline and the SLOs is preferred to any that doesn't.

A priority halves (a negative one doubles) what others' milliseconds count.

If the best worker has no free slot or KV blocks, `has_room` is False: the request should
wait for it. Another worker would compute the prefix anew, and evict for it what others
need: when the whole fleet is short of memory, that costs more than the wait.

Totals closer than `TIE` are equal, since the estimates are no better: then the less
loaded worker is taken, then the one that holds more, then the next in turn.
"""

from __future__ import annotations

from heapq import nsmallest
from typing import TYPE_CHECKING

from services.router.policies.base import Candidate, Choice, RoutingRequest, eligible

if TYPE_CHECKING:
    from collections.abc import Sequence

STALL_WEIGHT = 0.7
PACE_WEIGHT = 0.05
#: Tokens of an answer whose length nobody limits further.
EXPECTED_TOKENS = 340
#: What a missed objective costs, beside what it is missed by.
MISSED_MS = 10_000.0
#: Relative; what the calibration of two equal workers differs by.
TIE = 0.02
#: Sequences that may wait at a worker beside those that fill its slots, so that none is
#: empty while the news that one became free is under way.
QUEUE_AHEAD = 2
#: Of more workers than this, only those that hold some of the prompt, and so many of
#: the least loaded others, are looked at closely.
MANY, LEAST_LOADED = 128, 32


class Kv:
    """See the module's docstring."""

    name = "kv"

    def choose(self, request: RoutingRequest, candidates: Sequence[Candidate]) -> Choice | None:
        """See Policy."""
        pool = eligible(request, candidates)
        if not pool:
            return None
        if len(pool) > MANY:
            pool = _promising(pool)
        totals = [sum(parts) for parts in _parts(request, pool)]
        limit = min(totals) * (1 + TIE)
        close = [c for c, total in zip(pool, totals, strict=True) if total <= limit]
        if len(close) > 1:
            best = min(map(_burden, close))
            close = [c for c in close if _burden(c) == best]
        candidate = close[request.turn % len(close)]
        ttft_ms = candidate.predicted_ttft_ms(request.num_tokens)
        return Choice(candidate, ttft_ms, has_room(request, candidate))

    def explain(
        self, request: RoutingRequest, candidates: Sequence[Candidate]
    ) -> list[dict[str, float]]:
        """See Policy."""
        names = ("queue", "transfer", "prefill", "step", "stall", "pace", "late")
        return [dict(zip(names, parts, strict=True)) for parts in _parts(request, candidates)]


def has_room(request: RoutingRequest, candidate: Candidate) -> bool:
    """Whether the worker has a slot and KV blocks for the request now, as far as is known."""
    load = candidate.load
    if not load.sequences:
        return True
    if load.max_sequences and load.sequences >= load.max_sequences + QUEUE_AHEAD:
        return False
    if not (load.total_blocks and load.block_size):
        return True
    cached = max(candidate.matched_tokens, candidate.coming_tokens)
    needed = -(-(request.num_tokens - cached) // load.block_size) + request.num_sequences
    return load.used_blocks + needed <= load.total_blocks


def _parts(
    request: RoutingRequest, candidates: Sequence[Candidate]
) -> list[tuple[float, float, float, float, float, float, float]]:
    """The parts of each total. One loop without calls: it is most of a decision's cost.

    The first four are what `Candidate.ttft_parts` says.
    """
    num_tokens, num_sequences = request.num_tokens, request.num_sequences
    others = 2.0 ** -max(-4, min(request.priority, 4)) if request.priority else 1.0
    tokens = min(request.max_tokens or EXPECTED_TOKENS, EXPECTED_TOKENS)
    has_objective = request.timeout_ms or request.slo_ttft_ms or request.slo_itl_ms
    found = []
    for _, matched, load, timing, slower, transfer_ms, coming in candidates:
        queued, sequences, used, _, _, block_size = load
        c, a, s, x, d, q, r, step_tokens, _ = timing
        cached = matched + slower
        if coming > cached:
            cached, transfer_ms = coming, 0.0
        new = num_tokens - cached
        prefill_ms = 0.0
        if new > 0:
            chunk = step_tokens if 0 < step_tokens < new else new
            squares = new * chunk
            context = new * cached + (new * new - squares) / 2
            prefill_ms = c * -(-new // chunk) + a * new + s * squares + x * context
        held = used * block_size
        step_ms = d + q * sequences + r * held if sequences else 0.0
        queue_ms = 0.0
        if queued:
            queue_ms = queued * (a + s * step_tokens)
            if step_tokens:
                queue_ms += queued / step_tokens * (c + step_ms)
        stall_ms = STALL_WEIGHT * prefill_ms * others
        itl_ms = d + q * (sequences + num_sequences) + r * (held + num_tokens)
        pace_ms = PACE_WEIGHT * tokens * itl_ms
        late_ms = 0.0
        if has_objective:
            ttft_ms = queue_ms + transfer_ms + prefill_ms + step_ms
            late_ms = _late_ms(request, ttft_ms, itl_ms, tokens)
        found.append((queue_ms, transfer_ms, prefill_ms, step_ms, stall_ms, pace_ms, late_ms))
    return found


def _late_ms(request: RoutingRequest, ttft_ms: float, itl_ms: float, tokens: int) -> float:
    """For each objective that would be missed, `MISSED_MS` and what it is missed by."""
    late_ms = 0.0
    if 0 < request.timeout_ms < ttft_ms + itl_ms * tokens:
        late_ms += MISSED_MS + ttft_ms + itl_ms * tokens - request.timeout_ms
    if 0 < request.slo_ttft_ms < ttft_ms:
        late_ms += MISSED_MS + ttft_ms - request.slo_ttft_ms
    if 0 < request.slo_itl_ms < itl_ms:
        late_ms += MISSED_MS + (itl_ms - request.slo_itl_ms) * tokens
    return late_ms


def _promising(pool: Sequence[Candidate]) -> list[Candidate]:
    """Those that hold some of the prompt or will, and the least loaded others."""
    holders = [c for c in pool if c.matched_tokens or c.coming_tokens or c.slower_tokens]
    others = [c for c in pool if not (c.matched_tokens or c.coming_tokens or c.slower_tokens)]
    return holders + nsmallest(LEAST_LOADED, others, key=_burden)


def _burden(candidate: Candidate) -> tuple[int, int, int]:
    load = candidate.load
    return (load.sequences, load.prefill_tokens, -candidate.matched_tokens)
