"""The decision: from a prompt's block ids to the worker that should take it.

Composes fleet, index, policy, reservations and the requests that wait. Synchronous and
in memory: no Redis, no stream, no message types, no clock (`now` is in seconds of the
caller's). A request's way:

    route ── a worker has room ──────────────▶ Decision, reserved
      └───── all are saturated ──▶ None: it waits
                                     └── admit ──▶ Decision, reserved, or an error

Call `admit` when something may have made room, and at `next_at`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.errors import (
    DeadlineExceeded,
    HeadraceError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from services.router.candidates import Candidates, as_list
from services.router.fleet import TIERS, Worker
from services.router.objectives import Objectives
from services.router.peer_loads import PeerLoads
from services.router.policies import Candidate, Choice, RoutingRequest
from services.router.reservations import GRACE_S, Reservation, Reservations
from services.router.waiting import MAX_WAITING, Waiter, Waiting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.router.block_table import Ids
    from services.router.fleet import Fleet, Model
    from services.router.policies import Policy

#: When to ask again for a worker, in ms: what a new one or a reconnect takes.
RETRY_AFTER_MS = 500
#: So many of a line that find no room are looked at, one after the other, at a time.
MAX_BLOCKED = 64
#: Looking at more than a few that find no room is paced: so long for each of the others.
FEW_BLOCKED, PACE_S = 8, 0.002
#: Nobody overtakes one that has waited so long at the worker that it waits for.
PATIENCE_S = 15.0
#: Prompts that begin with the same so many blocks have one `prefix_hash`.
FAMILY_BLOCKS = 4


class Decision(NamedTuple):
    """Where a request goes, and why."""

    worker: Worker
    choice: Choice
    #: What the policy was given.
    candidates: Sequence[Candidate]
    request: RoutingRequest

    @property
    def matched_tokens(self) -> int:
        """Leading tokens of the prompt that the worker need not compute."""
        return self.choice.candidate.matched_tokens

    @property
    def predicted_ttft_ms(self) -> float:
        """What to expect there."""
        return self.choice.predicted_ttft_ms

    @property
    def has_room(self) -> bool:
        """False: the request should wait for room there."""
        return self.choice.has_room


class Admitted(NamedTuple):
    """What became of a request that waited."""

    gateway_id: str
    request_id: int
    outcome: Decision | HeadraceError


@dataclass(frozen=True, slots=True)
class ExplainedWorker:
    """One member as a decision sees it. `leading` blocks: by tier, faster ones counted in."""

    worker: Worker
    candidate: Candidate
    leading: dict[str, int]
    eligible: bool
    #: It has no room for the request: if it were chosen, the request would wait.
    saturated: bool
    #: What the policy counts, in ms by name.
    parts: Mapping[str, float]


class Router:
    """The router's core.

    `first_turn` should differ between routers of the same workers: those that are
    equal to all of them are then not taken by all at once. `max_waiting` requests may
    wait; `objectives` are what policies are told of SLOs.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        *,
        first_turn: int = 0,
        objectives: Objectives | None = None,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.fleet = fleet
        self.policy = policy
        self.counters = fleet.counters
        self.reservations = Reservations()
        self.peers = PeerLoads()
        self.waiting = Waiting(max_waiting)
        self.candidates = Candidates(fleet, self.reservations, self.peers)
        self._objectives = objectives or Objectives()
        self._first_turn = first_turn
        #: Refused for others' sake, to be told by the next `admit`.
        self._displaced: list[Admitted] = []
        #: Lines are not looked at again before, and whether somebody wanted it meanwhile.
        self._rests_until = -math.inf
        self._is_look_due = False
        fleet.on_leave.append(lambda _, worker: self.reservations.drop_worker(worker.key))

    def request(
        self, model_name: str, block_ids: Ids | Sequence[int], num_tokens: int, **fields: Any
    ) -> RoutingRequest:
        """A request as policies read it: with its turn, its prefix hash and the model's SLOs.

        `fields` are those of RoutingRequest.
        """
        objective = self._objectives.of(model_name)
        last = min(len(block_ids), FAMILY_BLOCKS)
        return RoutingRequest(
            num_tokens=num_tokens,
            slo_ttft_ms=objective.ttft_ms,
            slo_itl_ms=objective.itl_ms,
            # An id stands for all blocks before it, too.
            prefix_hash=int(block_ids[last - 1]) if last else 0,
            turn=self.turn(model_name),
            **fields,
        )

    def route(
        self,
        gateway_id: str,
        request_id: int,
        model_name: str,
        block_ids: Ids | Sequence[int],
        request: RoutingRequest,
        now: float,
    ) -> Decision | None:
        """Choose a worker and reserve there, or let the request wait: None.

        It waits if the policy says that its worker has no room, or if others wait
        for the model already: `admit` then sees who comes first. Repeating a request
        that waits changes nothing. Raises as `select` does; ResourceExhausted when too
        many wait or are in flight, DeadlineExceeded when its turn would not come in
        time; KeyError for a gateway that did not open.
        """
        try:
            model = self._checked(model_name, block_ids, request)
            if len(self.waiting) and self._waits_again(gateway_id, request_id):
                return None
            if not self.waiting.has_line(model_name) or not _can_wait(model, request):
                decision = self._choose(model, block_ids, request)
                if decision.has_room:
                    self.reserve(gateway_id, request_id, decision, request, block_ids)
                    self._count(model, decision, len(block_ids))
                    return decision
            self._let_wait(gateway_id, request_id, model_name, block_ids, request, now)
            return None
        except HeadraceError:
            self.counters.refused_decisions += 1
            raise

    def admit(self, now: float) -> list[Admitted]:
        """Place those who waited, in order, while there is room; refuse those out of time."""
        done, self._displaced = self._displaced, []
        if not len(self.waiting):
            return done
        for waiter in self.waiting.overdue(now):
            self.waiting.remove(waiter)
            self.counters.queue_deadlines += 1
            waited_s = now - waiter.arrived
            error = DeadlineExceeded(
                f"all workers of model {waiter.model!r} were busy for the {waited_s:.1f} s "
                "that the request had"
            )
            done.append(self._refused(waiter, error))
        self._is_look_due = now < self._rests_until
        if not self._is_look_due:
            lines = [self.waiting.line(model_name) for model_name in self.waiting.models]
            num_blocked = sum(self._admit_line(line, now, done) for line in lines)
            self._rests_until = now + PACE_S * max(0, num_blocked - FEW_BLOCKED)
        return done

    @property
    def next_at(self) -> float:
        """When `admit` has something to do although nothing has happened; infinity: never."""
        if self._displaced:
            return -math.inf
        looks_at = self._rests_until if self._is_look_due else math.inf
        return min(looks_at, self.waiting.next_deadline)

    def open(
        self,
        gateway_id: str,
        connection: object,
        announced: Iterable[tuple[int, Reservation]],
        now: float,
    ) -> None:
        """The gateway's stream is `connection` now; see Reservations.open.

        What waits for it keeps its place for the grace, until it is repeated.
        """
        self.waiting.lost(gateway_id, now)
        self.reservations.open(gateway_id, connection, announced)

    def lost(self, gateway_id: str, connection: object, now: float) -> None:
        """The stream `connection` ended; the gateway may come back within the grace."""
        if self.reservations.lost(gateway_id, connection, now):
            self.waiting.lost(gateway_id, now)

    def expire(self, now: float) -> None:
        """Forget what is left of gateways whose grace is over."""
        self.reservations.expire(now)
        self.waiting.expire(now, GRACE_S)

    def cancel(self, gateway_id: str, request_id: int) -> None:
        """Nobody wants the request any more, whether it waits or has its worker."""
        waiter = self.waiting.find(gateway_id, request_id)
        if waiter is not None:
            self.waiting.remove(waiter)
            self.counters.queue_cancels += 1
        # Its answer and the cancel may have crossed: nobody else will release it.
        self.reservations.release(gateway_id, request_id)

    def select(
        self, model_name: str, block_ids: Ids | Sequence[int], request: RoutingRequest
    ) -> Decision:
        """Choose a worker for a prompt with the short ids `block_ids`. Reserves nothing.

        It does not wait: a saturated worker may be chosen. Raises NotFound for an
        unknown model, Unavailable while it has no worker to choose, InvalidArgument
        for impossible counts.
        """
        try:
            model = self._checked(model_name, block_ids, request)
            decision = self._choose(model, block_ids, request)
        except HeadraceError:
            self.counters.refused_decisions += 1
            raise
        self._count(model, decision, len(block_ids))
        return decision

    def explain(
        self, model_name: str, block_ids: Ids | Sequence[int], request: RoutingRequest
    ) -> tuple[list[ExplainedWorker], Choice | None]:
        """All members of the model as `select` would see them now, and its choice, uncounted.

        Raises NotFound, InvalidArgument.
        """
        model = self._checked(model_name, block_ids, request)
        reaches = self.fleet.index.reaches(block_ids)
        members = [worker for _, worker in sorted(model.workers.items())]
        candidates = self.candidates.of(members, block_ids, request.num_tokens)
        alone = [self.policy.choose(request, [candidate]) for candidate in candidates]
        explained = [
            ExplainedWorker(
                worker,
                candidate,
                {
                    tier: reach.get(worker.slot, 0)
                    for tier, reach in zip(TIERS, reaches, strict=False)
                    if tier in worker.card.tiers
                },
                eligible=worker in model.eligible,
                saturated=choice is not None and not choice.has_room,
                parts=parts,
            )
            for worker, candidate, choice, parts in zip(
                members, candidates, alone, self.policy.explain(request, candidates), strict=True
            )
        ]
        eligible = [entry.candidate for entry in explained if entry.eligible]
        return explained, self.policy.choose(request, eligible)

    def turn(self, model_name: str) -> int:
        """Decisions made for a model so far, after the first turn."""
        model = self.fleet.models.get(model_name)
        return self._first_turn + (model.turn if model else 0)

    def reserve(
        self,
        gateway_id: str,
        request_id: int,
        decision: Decision,
        request: RoutingRequest,
        block_ids: Ids | Sequence[int] = (),
    ) -> None:
        """Count the decided request as the worker's load. Raises ResourceExhausted.

        Those of `block_ids` that are not cached there are known to come.
        """
        block_size = decision.worker.card.model.block_size
        missing = block_ids[decision.matched_tokens // block_size :]
        reservation = Reservation(
            worker=decision.worker.key,
            prefill_tokens=request.num_tokens - decision.matched_tokens,
            # Each sequence begins a block of its own after the prompt they share.
            blocks=-(-request.num_tokens // block_size) + request.num_sequences,
            sequences=request.num_sequences,
            coming=as_list(missing) if len(missing) else (),
        )
        self.reservations.reserve(gateway_id, request_id, reservation)

    def _checked(self, name: str, block_ids: Ids | Sequence[int], request: RoutingRequest) -> Model:
        model = self.fleet.models.get(name)
        if model is None:
            served = ", ".join(sorted(self.fleet.models)) or "none yet"
            raise NotFound(f"model {name!r} is not served here (models: {served})", field="model")
        if request.num_tokens < 1:
            raise InvalidArgument("num_tokens must be 1 or more, not 0", field="num_tokens")
        full = request.num_tokens // model.card.block_size
        if len(block_ids) > full:
            raise InvalidArgument(
                f"block_ids holds {len(block_ids)} blocks; {request.num_tokens} tokens in blocks "
                f"of {model.card.block_size} have {full} full ones",
                field="block_ids",
            )
        return model

    def _choose(
        self, model: Model, block_ids: Ids | Sequence[int], request: RoutingRequest
    ) -> Decision:
        candidates = self.candidates.of(model.eligible, block_ids, request.num_tokens)
        choice = self.policy.choose(request, candidates)
        if choice is None:
            raise Unavailable(_why_none(model), retry_after_ms=RETRY_AFTER_MS)
        worker = model.workers[choice.candidate.worker_id]
        return Decision(worker, choice, candidates, request)

    def _count(self, model: Model, decision: Decision, num_blocks: int) -> None:
        """A decision was made, and holds."""
        model.turn += 1
        counters = self.counters
        counters.decisions += 1
        counters.prompt_tokens += decision.request.num_tokens
        matched = decision.matched_tokens
        counters.matched_tokens += matched
        if num_blocks and not matched and not any(c.matched_tokens for c in decision.candidates):
            counters.zero_matches += 1

    def _waits_again(self, gateway_id: str, request_id: int) -> bool:
        """Whether the request waits already: then its stream was lost, and it is claimed."""
        waiter = self.waiting.find(gateway_id, request_id)
        if waiter is None:
            return False
        waiter.unclaimed_since = None
        return True

    def _let_wait(
        self,
        gateway_id: str,
        request_id: int,
        model_name: str,
        block_ids: Ids | Sequence[int],
        request: RoutingRequest,
        now: float,
    ) -> None:
        deadline = now + request.timeout_ms / 1000 if request.timeout_ms else math.inf
        waiter = Waiter(gateway_id, request_id, model_name, block_ids, request, now, deadline)
        try:
            displaced = self.waiting.add(waiter, now)
        except DeadlineExceeded:
            self.counters.queue_deadlines += 1
            raise
        except HeadraceError:
            self.counters.queue_refusals += 1
            raise
        self.counters.waits += 1
        if displaced is not None:
            self.counters.queue_refusals += 1
            error = self.waiting.refusal(model_name, now)
            self._displaced.append(self._refused(displaced, error))

    def _admit_line(self, line: list[Waiter], now: float, done: list[Admitted]) -> int:
        """Place those of one model's line who find room; what became of each goes to `done`.

        Returns how many found none.
        """
        #: The first that waits for each worker.
        first_at: dict[str, Waiter] = {}
        num_blocked = 0
        for waiter in line:
            if waiter.unclaimed_since is not None:
                continue
            outcome = self._place(waiter, first_at, now)
            if outcome is not None:
                done.append(outcome)
                continue
            num_blocked += 1
            if num_blocked == MAX_BLOCKED:
                break
        return num_blocked

    def _place(self, waiter: Waiter, first_at: dict[str, Waiter], now: float) -> Admitted | None:
        """Give the waiter its worker; an error if there is none; None if it has no room,
        or if the one of `first_at` that waits for the worker must not be overtaken."""
        request = waiter.request
        left_ms = max(1, int((waiter.deadline - now) * 1000)) if request.timeout_ms else 0
        request = replace(request, timeout_ms=left_ms, turn=self.turn(waiter.model))
        block_ids = waiter.block_ids
        try:
            model = self._checked(waiter.model, block_ids, request)
            decision = self._choose(model, block_ids, request)
            first = first_at.setdefault(decision.worker.key.worker_id, waiter)
            if not decision.has_room or not _may_overtake(waiter, first, now):
                return None
            if first is waiter:
                del first_at[decision.worker.key.worker_id]
            self.reserve(waiter.gateway_id, waiter.request_id, decision, request, block_ids)
        except HeadraceError as error:
            self.waiting.remove(waiter)
            return self._refused(waiter, error)
        self._count(model, decision, len(block_ids))
        self.waiting.placed(waiter, now)
        return Admitted(waiter.gateway_id, waiter.request_id, decision)

    def _refused(self, waiter: Waiter, error: HeadraceError) -> Admitted:
        self.counters.refused_decisions += 1
        return Admitted(waiter.gateway_id, waiter.request_id, error)


def _may_overtake(waiter: Waiter, first: Waiter, now: float) -> bool:
    """Whether the waiter may be placed where `first`, which is before it, finds no room.

    A short prompt may take what is too little for a long one, or the worker would stand
    idle; but not from one of higher priority or with an earlier deadline, and not from
    one that has waited for long.
    """
    if first is waiter:
        return True
    return first.order[:2] == waiter.order[:2] and now - first.arrived < PATIENCE_S


def _can_wait(model: Model, request: RoutingRequest) -> bool:
    """Whether there is any worker to wait for."""
    excluded = request.exclude_workers
    return any(worker.key.worker_id not in excluded for worker in model.eligible)


def _why_none(model: Model) -> str:
    name = model.card.name
    if model.eligible:
        return f"the request failed on every worker of model {name!r} that answers"
    if model.workers:
        return f"none of the {len(model.workers)} workers of model {name!r} answers"
    if model.refused:
        return f"all workers of model {name!r} are refused: see the router's log"
    return f"model {name!r} has no worker now"
