"""What a routing policy is given, and what it returns.

A policy is pure: equal arguments give an equal choice. It does no I/O, has no
clock and keeps no state; whatever must go on from decision to decision is in
its arguments. So it runs unchanged in virtual time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from services.router.latency_model import Timing

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What matters of a request for the choice."""

    num_tokens: int
    max_tokens: int = 0
    num_sequences: int = 1
    tenant: str = ""
    priority: int = 0
    #: What is left of its deadline, in ms; 0: none.
    timeout_ms: int = 0
    #: What the operator wants for this model, in ms; 0: nothing said.
    slo_ttft_ms: float = 0.0
    slo_itl_ms: float = 0.0
    session_id: str = ""
    #: The prompt's first block ids, by which stateless policies hash; 0: shorter than a block.
    prefix_hash: int = 0
    #: Workers where this request failed already.
    exclude_workers: frozenset[str] = frozenset()
    #: How many requests for the model were decided before: it breaks ties, and
    #: is what round robin goes round by.
    turn: int = 0


class Load(NamedTuple):
    """What a worker has to do: what it said last, and what was sent there since."""

    #: Prompt tokens sent there and not yet computed.
    prefill_tokens: int = 0
    #: Sequences that run or wait there.
    sequences: int = 0
    #: KV blocks that they hold or will soon hold, and all there are; 0: unknown.
    used_blocks: int = 0
    total_blocks: int = 0
    #: Sequences that one step runs at most; 0: unknown.
    max_sequences: int = 0
    #: Tokens in a block; 0: unknown.
    block_size: int = 0


_IDLE = Load()
_PRIOR = Timing()


class Candidate(NamedTuple):
    """One worker that could take the request."""

    worker_id: str
    #: Leading tokens of the prompt that it need not compute.
    matched_tokens: int = 0
    load: Load = _IDLE
    timing: Timing = _PRIOR
    #: Tokens after the matched ones that lie in slower tiers there, and what bringing
    #: them to the device takes.
    slower_tokens: int = 0
    transfer_ms: float = 0.0
    #: Leading tokens of the prompt, the matched ones with them, that prompts sent
    #: there before will have computed once the queue ahead is done.
    coming_tokens: int = 0

    def ttft_parts(self, num_tokens: int) -> tuple[float, float, float, float]:
        """What the predicted time to first token of a prompt consists of, in ms.

        The queue ahead, each step of which also decodes what runs there; the blocks that
        come from slower tiers; the prefill of the tokens that are not cached by then;
        and, beside running sequences, the decode of the step that samples.
        """
        _, matched, load, timing, slower, transfer_ms, coming = self
        cached = matched + slower
        if coming > cached:
            cached, transfer_ms = coming, 0.0
        step_ms = queue_ms = 0.0
        if load.sequences:
            step_ms = timing.decode_ms(load.sequences, load.used_blocks * load.block_size)
        if load.prefill_tokens:
            queue_ms = timing.queue_ms(load.prefill_tokens, step_ms)
        return queue_ms, transfer_ms, timing.prefill_ms(num_tokens - cached, cached), step_ms

    def predicted_ttft_ms(self, num_tokens: int) -> float:
        """The sum of `ttft_parts`."""
        queue_ms, transfer_ms, prefill_ms, step_ms = self.ttft_parts(num_tokens)
        return queue_ms + transfer_ms + prefill_ms + step_ms


class Choice(NamedTuple):
    """The worker chosen, and what to expect there."""

    candidate: Candidate
    predicted_ttft_ms: float
    #: False: it is the best although it can't begin now. The request should wait at the
    #: router for room there, and be decided anew when loads change.
    has_room: bool = True


class Policy(Protocol):
    """Chooses a worker. Stateless: one object serves all models."""

    name: str

    def choose(self, request: RoutingRequest, candidates: Sequence[Candidate]) -> Choice | None:
        """The best of `candidates` that the request does not exclude; None if there is none.

        `candidates` are in a fixed order, that of their worker ids.
        """

    def explain(
        self, request: RoutingRequest, candidates: Sequence[Candidate]
    ) -> list[dict[str, float]]:
        """What stands behind the choice: for each candidate its parts by name, in ms.

        Their sum is what decides between candidates; the smallest wins. A policy that
        does not predict gives the parts of the predicted time to first token.
        """


def eligible(request: RoutingRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """The candidates that the request does not exclude."""
    if not request.exclude_workers:
        return candidates
    return [c for c in candidates if c.worker_id not in request.exclude_workers]


def choice(request: RoutingRequest, candidate: Candidate) -> Choice:
    """The choice of `candidate`, with its prediction."""
    return Choice(candidate, candidate.predicted_ttft_ms(request.num_tokens))


def explain_ttft(
    request: RoutingRequest, candidates: Sequence[Candidate]
) -> list[dict[str, float]]:
    """`Policy.explain` of a policy that does not choose by prediction."""
    names = ("queue", "transfer", "prefill", "step")
    return [
        dict(zip(names, candidate.ttft_parts(request.num_tokens), strict=True))
        for candidate in candidates
    ]
