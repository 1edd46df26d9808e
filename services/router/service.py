"""The decision: from a prompt's block ids to the worker that should take it.

Composes fleet, index, policy and reservations. Synchronous and in memory: no
Redis, no stream, no message types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.errors import InvalidArgument, NotFound, Unavailable
from services.router.fleet import Worker
from services.router.policies import Candidate, Load
from services.router.reservations import Reservation, Reservations

if TYPE_CHECKING:
    from services.router.fleet import Fleet, Model
    from services.router.policies import Policy, RoutingRequest

#: When to ask again for a worker, in ms: what a new one or a reconnect takes.
RETRY_AFTER_MS = 500


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and why."""

    worker: Worker
    matched_tokens: int
    predicted_ttft_ms: float
    num_candidates: int


class Router:
    """The router's core."""

    def __init__(self, fleet: Fleet, policy: Policy) -> None:
        self.fleet = fleet
        self.policy = policy
        self.reservations = Reservations()
        fleet.on_leave.append(lambda _, worker: self.reservations.drop_worker(worker.key))

    def select(self, model_name: str, block_ids: list[int], request: RoutingRequest) -> Decision:
        """Choose a worker for a prompt with the short ids `block_ids`. Reserves nothing.

        Raises NotFound for an unknown model, Unavailable while it has no worker
        to choose, InvalidArgument for impossible counts.
        """
        model = self._model(model_name)
        _check(model, block_ids, request)
        candidates = self._candidates(model, block_ids, request.num_tokens)
        choice = self.policy.choose(request, candidates)
        if choice is None:
            raise Unavailable(_why_none(model), retry_after_ms=RETRY_AFTER_MS)
        model.turn += 1
        worker = model.workers[choice.candidate.worker_id]
        return Decision(
            worker, choice.candidate.matched_tokens, choice.predicted_ttft_ms, len(candidates)
        )

    def turn(self, model_name: str) -> int:
        """Decisions made for a model so far."""
        model = self.fleet.models.get(model_name)
        return model.turn if model else 0

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

    def _candidates(self, model: Model, block_ids: list[int], num_tokens: int) -> list[Candidate]:
        overlaps = self.fleet.index.overlaps(block_ids)
        block_size = model.card.block_size
        # The engine computes the last token at least, to have logits to sample from.
        most = (num_tokens - 1) // block_size
        return [
            Candidate(
                worker.key.worker_id,
                min(overlaps.get(worker.slot, 0), most) * block_size,
                self._load(worker),
                worker.latency.timing,
            )
            for worker in model.eligible
        ]

    def _load(self, worker: Worker) -> Load:
        """The larger of what is reserved and what is reported.

        A report is late by a hop and misses what was just sent; reservations miss
        what other routers sent, and count a prompt as a whole until its first token.
        """
        said = worker.load
        reserved = self.reservations.load(worker.key)
        return Load(
            max(said.queued_prefill_tokens, reserved.prefill_tokens),
            max(said.active_sequences + said.queued_sequences, reserved.sequences),
        )


def _check(model: Model, block_ids: list[int], request: RoutingRequest) -> None:
    if request.num_tokens < 1:
        raise InvalidArgument("num_tokens must be 1 or more, not 0", field="num_tokens")
    full = request.num_tokens // model.card.block_size
    if len(block_ids) > full:
        raise InvalidArgument(
            f"block_ids holds {len(block_ids)} blocks; {request.num_tokens} tokens in blocks "
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
