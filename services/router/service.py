"""The decision: from a prompt's block ids to the worker that should take it.

Composes fleet, index, policy and reservations. Synchronous and in memory: no
Redis, no stream, no message types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.errors import HeadraceError, InvalidArgument, NotFound, Unavailable
from services.router.fleet import TIERS, Worker
from services.router.peer_loads import PeerLoads
from services.router.policies import Candidate, Load
from services.router.reservations import Reservation, Reservations

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from services.router.block_table import Ids
    from services.router.fleet import Fleet, Model
    from services.router.policies import Choice, Policy, RoutingRequest

#: When to ask again for a worker, in ms: what a new one or a reconnect takes.
RETRY_AFTER_MS = 500


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and why."""

    worker: Worker
    matched_tokens: int
    predicted_ttft_ms: float
    num_candidates: int


@dataclass(frozen=True, slots=True)
class ExplainedWorker:
    """One member as a decision sees it. `leading` blocks: by tier, faster ones counted in."""

    worker: Worker
    candidate: Candidate
    leading: dict[str, int]
    eligible: bool


class Router:
    """The router's core.

    `first_turn` should differ between routers of the same workers: those that are
    equal to all of them are then not taken by all at once.
    """

    def __init__(self, fleet: Fleet, policy: Policy, *, first_turn: int = 0) -> None:
        self.fleet = fleet
        self.policy = policy
        self.counters = fleet.counters
        self.reservations = Reservations()
        self.peers = PeerLoads()
        self._first_turn = first_turn
        fleet.on_leave.append(lambda _, worker: self.reservations.drop_worker(worker.key))

    def select(
        self, model_name: str, block_ids: Ids | Sequence[int], request: RoutingRequest
    ) -> Decision:
        """Choose a worker for a prompt with the short ids `block_ids`. Reserves nothing.

        Raises NotFound for an unknown model, Unavailable while it has no worker
        to choose, InvalidArgument for impossible counts.
        """
        try:
            model = self._model(model_name)
            _check(model, len(block_ids), request)
            overlaps = self.fleet.index.overlaps(block_ids)
            candidates = self._candidates(model, model.eligible, overlaps, request.num_tokens)
            choice = self.policy.choose(request, candidates)
            if choice is None:
                raise Unavailable(_why_none(model), retry_after_ms=RETRY_AFTER_MS)
        except HeadraceError:
            self.counters.refused_decisions += 1
            raise
        model.turn += 1
        self._count(request, candidates, choice, len(block_ids))
        worker = model.workers[choice.candidate.worker_id]
        return Decision(
            worker, choice.candidate.matched_tokens, choice.predicted_ttft_ms, len(candidates)
        )

    def explain(
        self, model_name: str, block_ids: Ids | Sequence[int], request: RoutingRequest
    ) -> tuple[list[ExplainedWorker], Choice | None]:
        """All members of the model as `select` would see them now, and its choice, uncounted.

        Raises NotFound, InvalidArgument.
        """
        model = self._model(model_name)
        _check(model, len(block_ids), request)
        reaches = self.fleet.index.reaches(block_ids)
        members = [worker for _, worker in sorted(model.workers.items())]
        explained = [
            ExplainedWorker(
                worker,
                candidate,
                {
                    tier: reach.get(worker.slot, 0)
                    for tier, reach in zip(TIERS, reaches, strict=False)
                    if tier in worker.card.tiers
                },
                worker in model.eligible,
            )
            for worker, candidate in zip(
                members,
                self._candidates(model, members, reaches[0], request.num_tokens),
                strict=True,
            )
        ]
        candidates = [entry.candidate for entry in explained if entry.eligible]
        return explained, self.policy.choose(request, candidates)

    def turn(self, model_name: str) -> int:
        """Decisions made for a model so far, after the first turn."""
        model = self.fleet.models.get(model_name)
        return self._first_turn + (model.turn if model else 0)

    def reserve(
        self, gateway_id: str, request_id: int, decision: Decision, request: RoutingRequest
    ) -> None:
        """Count the decided request as the worker's load. Raises ResourceExhausted."""
        prompt_blocks = -(-request.num_tokens // decision.worker.card.model.block_size)
        reservation = Reservation(
            worker=decision.worker.key,
            prefill_tokens=request.num_tokens - decision.matched_tokens,
            # Each sequence begins a block of its own after the prompt they share.
            blocks=prompt_blocks + request.num_sequences,
            sequences=request.num_sequences,
        )
        self.reservations.reserve(gateway_id, request_id, reservation)

    def _model(self, name: str) -> Model:
        model = self.fleet.models.get(name)
        if model is None:
            served = ", ".join(sorted(self.fleet.models)) or "none yet"
            raise NotFound(f"model {name!r} is not served here (models: {served})", field="model")
        return model

    def _candidates(
        self, model: Model, workers: Iterable[Worker], overlaps: dict[int, int], num_tokens: int
    ) -> list[Candidate]:
        block_size = model.card.block_size
        # The engine computes the last token at least, to have logits to sample from.
        most = (num_tokens - 1) // block_size
        candidates = []
        for worker in workers:
            held = overlaps.get(worker.slot, 0)
            matched = (held if held < most else most) * block_size
            timing = worker.latency.timing
            load = self._load(worker)
            candidates.append(Candidate(worker.key.worker_id, matched, load, timing))
        return candidates

    def _count(
        self, request: RoutingRequest, candidates: list[Candidate], choice: Choice, num_blocks: int
    ) -> None:
        counters = self.counters
        counters.decisions += 1
        counters.prompt_tokens += request.num_tokens
        matched = choice.candidate.matched_tokens
        counters.matched_tokens += matched
        if num_blocks and not matched and not any(c.matched_tokens for c in candidates):
            counters.zero_matches += 1

    def _load(self, worker: Worker) -> Load:
        """The larger of what is reserved and what is reported.

        A report is late by a hop and misses what was just sent; reservations, other
        routers' with them, count a prompt as a whole until its first token.
        """
        said = worker.load
        reserved = self.reservations.load(worker.key)
        elsewhere = self.peers.load(worker.key)
        prefill_tokens = reserved.prefill_tokens + elsewhere.prefill_tokens
        sequences = reserved.sequences + elsewhere.sequences
        running = said.active_sequences + said.queued_sequences
        queued = said.queued_prefill_tokens
        return Load(
            queued if queued > prefill_tokens else prefill_tokens,
            running if running > sequences else sequences,
        )


def _check(model: Model, num_blocks: int, request: RoutingRequest) -> None:
    if request.num_tokens < 1:
        raise InvalidArgument("num_tokens must be 1 or more, not 0", field="num_tokens")
    full = request.num_tokens // model.card.block_size
    if num_blocks > full:
        raise InvalidArgument(
            f"block_ids holds {num_blocks} blocks; {request.num_tokens} tokens in blocks "
            f"of {model.card.block_size} have {full} full ones",
            field="block_ids",
        )


def _why_none(model: Model) -> str:
    name = model.card.name
    if model.eligible:
        return f"the request failed on every worker of model {name!r} that answers"
    if model.workers:
        return f"none of the {len(model.workers)} workers of model {name!r} answers"
    if model.refused:
        return f"all workers of model {name!r} are refused: see the router's log"
    return f"model {name!r} has no worker now"
