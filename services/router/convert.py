"""Between the router's own types and its messages. Decides nothing, keeps nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from headrace.blocks import ID_LEN
from headrace.errors import InvalidArgument
from headrace.rpc.convert import model_card_to_proto
from headrace.v1 import router_pb2, types_pb2
from services.router.reservations import Reservation, Reserved, WorkerKey

if TYPE_CHECKING:
    from collections.abc import Iterable

    from headrace.registry import WorkerCard
    from services.router.block_table import Ids
    from services.router.counters import Counters
    from services.router.fleet import Worker
    from services.router.policies import Choice, RoutingRequest
    from services.router.service import ExplainedWorker, Router
    from services.router.waiting import QueueState

_ID = np.dtype("<u8")
_NOBODY: frozenset[str] = frozenset()


def routing_request(
    select: router_pb2.SelectWorkerRequest, router: Router, ids: Ids | None = None
) -> tuple[Ids, RoutingRequest]:
    """The prompt's short ids, unless read already, and what matters of the request.

    Raises InvalidArgument.
    """
    if ids is None:
        packed = select.block_ids
        if len(packed) % ID_LEN:
            raise InvalidArgument(
                f"block_ids: {len(packed)} bytes are not a whole number of block ids",
                field="block_ids",
            )
        ids = short_ids(packed)
    return ids, router.request(
        select.model,
        ids,
        select.num_tokens,
        max_tokens=select.max_tokens,
        num_sequences=select.num_sequences or 1,
        tenant=select.tenant,
        priority=select.priority,
        timeout_ms=select.timeout_ms,
        session_id=select.session_id,
        exclude_workers=frozenset(select.exclude_workers) if select.exclude_workers else _NOBODY,
    )


def short_ids(packed: bytes) -> Ids:
    """The first 8 of each id's 16 bytes: what headrace.blocks.short_ids gives as a list."""
    return np.frombuffer(packed, _ID)[::2]


def plan(card: WorkerCard, policy: str) -> router_pb2.Plan:
    """A plan of one leg, without what differs from request to request."""
    return router_pb2.Plan(
        legs=[router_pb2.Leg(role=router_pb2.Leg.ROLE_COMPLETE, worker=worker_ref(card))],
        policy=policy,
    )


def reservation(told: router_pb2.Reservation) -> tuple[int, Reservation]:
    """A reservation that a gateway announces, and its id."""
    return told.id, Reservation(
        worker=WorkerKey(told.worker.worker_id, told.worker.generation),
        prefill_tokens=told.prefill_tokens,
        blocks=told.blocks,
        sequences=told.num_sequences,
    )


def loads(
    router_id: str, changed: Iterable[tuple[WorkerKey, Reserved]]
) -> router_pb2.WatchLoadsResponse:
    """What is reserved on the workers now, for other routers."""
    return router_pb2.WatchLoadsResponse(
        router_id=router_id,
        loads=[
            router_pb2.ReservedLoad(
                worker_id=worker.worker_id,
                generation=worker.generation,
                prefill_tokens=reserved.prefill_tokens,
                blocks=reserved.blocks,
                sequences=reserved.sequences,
                reservations=reserved.reservations,
            )
            for worker, reserved in changed
        ],
    )


def reserved(load: router_pb2.ReservedLoad) -> tuple[WorkerKey, Reserved]:
    """The inverse of `loads`, for one worker."""
    return WorkerKey(load.worker_id, load.generation), Reserved(
        load.prefill_tokens, load.blocks, load.sequences, load.reservations
    )


def worker_ref(card: WorkerCard) -> types_pb2.WorkerRef:
    """How others name the worker."""
    return types_pb2.WorkerRef(
        worker_id=card.worker_id, generation=card.generation, address=card.address
    )


def explanation(
    workers: list[ExplainedWorker],
    choice: Choice | None,
    request: RoutingRequest,
    policy: str,
    queue: QueueState,
) -> router_pb2.ExplainResponse:
    """Why a request would go where."""
    response = router_pb2.ExplainResponse(
        queue=_queue(queue),
        workers=[
            router_pb2.ExplainedWorker(
                worker=worker_ref(entry.worker.card),
                eligible=entry.eligible,
                leading=_tiers(entry.leading),
                matched_tokens=entry.candidate.matched_tokens,
                prefill_tokens=entry.candidate.load.prefill_tokens,
                sequences=entry.candidate.load.sequences,
                prefill_ms_per_token=entry.candidate.timing.prefill_ms_per_token,
                decode_step_ms=entry.candidate.timing.decode_step_ms,
                predicted_ttft_ms=entry.candidate.predicted_ttft_ms(request.num_tokens),
                used_blocks=entry.candidate.load.used_blocks,
                total_blocks=entry.candidate.load.total_blocks,
                max_sequences=entry.candidate.load.max_sequences,
                saturated=entry.saturated,
                slower_tokens=entry.candidate.slower_tokens,
                transfer_ms=entry.candidate.transfer_ms,
                coming_tokens=entry.candidate.coming_tokens,
                parts=entry.parts,
            )
            for entry in workers
        ],
    )
    for entry in workers:
        if choice is not None and entry.candidate is choice.candidate:
            response.plan.CopyFrom(plan(entry.worker.card, policy))
            response.plan.matched_tokens = entry.candidate.matched_tokens
            response.plan.predicted_ttft_ms = choice.predicted_ttft_ms
    return response


def fleet_state(router: Router, now: float) -> router_pb2.GetFleetResponse:
    """What the router believes of models and workers, who waits, and what it counted."""
    index = router.fleet.index
    return router_pb2.GetFleetResponse(
        models=[
            router_pb2.FleetModelState(
                card=model_card_to_proto(model.card),
                workers=[_worker_state(router, w) for _, w in sorted(model.workers.items())],
                refused=[
                    router_pb2.RefusedWorker(worker=worker_ref(r.card), reason=r.reason)
                    for _, r in sorted(model.refused.items())
                ],
            )
            for _, model in sorted(router.fleet.models.items())
        ],
        policy=router.policy.name,
        counters=_counters(router.counters, router.policy.name),
        queues={model: _queue(router.waiting.state(model, now)) for model in router.waiting.models},
        index=router_pb2.PrefixIndexState(blocks=len(index), num_bytes=index.num_bytes),
    )


def _worker_state(router: Router, worker: Worker) -> router_pb2.WorkerState:
    reserved = router.reservations.load(worker.key)
    tiers = router.fleet.num_owned(worker)
    return router_pb2.WorkerState(
        worker=worker_ref(worker.card),
        owned_blocks=sum(tiers.values()),
        last_sequence=worker.sequence,
        active_sequences=worker.load.active_sequences,
        queued_sequences=worker.load.queued_sequences,
        reserved_prefill_tokens=reserved.prefill_tokens,
        reservations=reserved.reservations,
        resyncs=worker.resyncs,
        last_resync_cause=worker.last_resync_cause,
        reachable=worker.reachable,
        tiers=_tiers(tiers),
        event_lag=worker.lag,
        draining=worker.load.draining,
        peer_reservations=router.peers.load(worker.key).reservations,
    )


def _tiers(blocks: dict[str, int]) -> list[router_pb2.TierBlocks]:
    return [router_pb2.TierBlocks(tier=tier, blocks=count) for tier, count in blocks.items()]


def _queue(state: QueueState) -> router_pb2.QueueState:
    return router_pb2.QueueState(
        waiting=state.waiting,
        limit=state.limit,
        placed_per_s=state.per_s,
        wait_ms=state.wait_s * 1000,
    )


def _counters(counters: Counters, policy: str) -> router_pb2.RouterCounters:
    return router_pb2.RouterCounters(
        decisions=counters.decisions,
        refused_decisions=counters.refused_decisions,
        zero_matches=counters.zero_matches,
        prompt_tokens=counters.prompt_tokens,
        matched_tokens=counters.matched_tokens,
        events=counters.events,
        resyncs=counters.resyncs,
        refusals=counters.refusals,
        outages=counters.outages,
        decisions_by_policy={policy: counters.decisions},
        waits=counters.waits,
        queue_refusals=counters.queue_refusals,
        queue_deadlines=counters.queue_deadlines,
        queue_cancels=counters.queue_cancels,
    )
