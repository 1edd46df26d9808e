"""The models and workers that the router knows: who they are, hold, do, and answer.

Membership and blocks come from ownership, load and liveness from the watchers
and gateways; the decision reads all of it. Plain memory: no I/O, no clock. One
task per model's partition changes membership and blocks; anyone may mark a
worker unreachable.

A worker can be chosen while it is a member, its health stream answers, and it
is not draining. A member whose card disagrees with its model is refused: it is
shown, and never chosen.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from headrace import blocks
from headrace.registry import DEVICE_TIER, ModelCard, WorkerCard
from services.router.counters import Counters
from services.router.latency_model import PEER_ROWS, LatencyModel, Timing, Totals, prior_of
from services.router.prefix_index import SLICE_LEN, PrefixIndex
from services.router.reservations import WorkerKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from headrace.registry import Event

log = logging.getLogger("headrace.router")

#: The tiers that are indexed, from the fastest; others' events count, and no more.
TIERS = (DEVICE_TIER, "host", "disk")
_TIER_NUMBERS = {tier: number for number, tier in enumerate(TIERS)}

_NOTHING = Totals()


@dataclass(frozen=True, slots=True)
class ReportedLoad:
    """What a worker last said of itself (see WorkerLoad in worker.proto)."""

    active_sequences: int = 0
    queued_sequences: int = 0
    queued_prefill_tokens: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    draining: bool = False
    totals: Totals = _NOTHING


_UNHEARD = ReportedLoad()


@dataclass(slots=True, eq=False)
class Worker:
    """One generation of one worker."""

    card: WorkerCard
    #: Its bit in the prefix index; a new one at every reload of its blocks.
    slot: int
    latency: LatencyModel
    reachable: bool = False
    load: ReportedLoad = _UNHEARD
    #: Number of the last event that the index holds.
    sequence: int = 0
    resyncs: int = 0
    last_resync_cause: str = ""
    #: Number of its last event in Redis, when somebody last looked there.
    published: int = 0
    #: No member any more: its slot is given back.
    has_left: bool = False
    key: WorkerKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = WorkerKey(self.card.worker_id, self.card.generation)

    @property
    def lag(self) -> int:
        """Events that are in Redis, as far as was seen, and not in the index."""
        return max(0, self.published - self.sequence)


@dataclass(frozen=True, slots=True)
class Refused:
    """A worker that disagrees with its model."""

    card: WorkerCard
    reason: str


@dataclass(slots=True, eq=False)
class Peers:
    """Workers that should take equally long: what all their steps say together."""

    latency: LatencyModel
    #: Members whose own steps say nothing yet.
    unmeasured: dict[str, Worker] = field(default_factory=dict)

    def expected(self) -> Timing:
        """Of a member that has computed nothing."""
        return self.latency.timing._replace(calibrated=False)


@dataclass(slots=True, eq=False)
class Model:
    """One model and its workers by id."""

    card: ModelCard
    workers: dict[str, Worker] = field(default_factory=dict)
    refused: dict[str, Refused] = field(default_factory=dict)
    #: The workers that can be chosen, by their ids' order.
    eligible: tuple[Worker, ...] = ()
    #: A card registered since that disagrees with the workers that serve.
    rival: ModelCard | None = None
    #: Decisions made.
    turn: int = 0
    #: What members of one engine and capacity have in common.
    peers: dict[tuple[str, int, int], Peers] = field(default_factory=dict)


class Fleet:
    """All models. `on_join`, `on_leave` and `on_change` are called after the change.

    `on_change` concerns what gateways are told: models, and workers to choose from;
    `on_report` each word of a worker about its load; `on_timing` what is expected of one
    that has said nothing itself.
    """

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.index = PrefixIndex()
        self.counters = Counters()
        self.on_join: list[Callable[[str, Worker], None]] = []
        self.on_leave: list[Callable[[str, Worker], None]] = []
        self.on_change: list[Callable[[], None]] = []
        self.on_report: list[Callable[[Worker], None]] = []
        self.on_timing: list[Callable[[Worker], None]] = []

    def set_model(self, card: ModelCard) -> None:
        """The model exists, and is registered with this card.

        The card may have been written by a worker that disagrees with those that
        serve: while there are any, a card that would exclude them does not count.
        """
        model = self.models.get(card.name)
        if model is None:
            self.models[card.name] = Model(card)
        elif card == model.card:
            return
        elif model.workers and (conflict := disagreement(card, model.card)):
            if card != model.rival:
                log.error(
                    "model %s was registered anew while %d workers serve it, and they would be "
                    "refused (its %s): it counts once they are gone",
                    card.name, len(model.workers), conflict,
                )  # fmt: skip
            model.rival = card
            return
        else:
            log.info("model %s has a new card: revision %s", card.name, card.revision)
            model.card, model.rival = card, None
        self._changed()

    def drop_model(self, name: str) -> None:
        """The model and all its workers are gone."""
        for worker_id in list(self.models[name].workers):
            self.leave(name, worker_id)
        del self.models[name]
        self._changed()

    def worker(self, model: str, worker_id: str) -> Worker | None:
        """The member of that name."""
        known = self.models.get(model)
        return known.workers.get(worker_id) if known else None

    def workers(self) -> Iterator[Worker]:
        """All members of all models."""
        return chain.from_iterable(model.workers.values() for model in self.models.values())

    def join(self, model_name: str, card: WorkerCard) -> Worker:
        """A new worker, or a new generation: it replaces the old one and owns nothing yet.

        A generation that another of the same address follows is the same process
        or its successor: it keeps the timing learned, and what its health stream says.
        """
        model = self.models[model_name]
        old = model.workers.pop(card.worker_id, None)
        model.refused.pop(card.worker_id, None)
        peers = model.peers.get(_kind(card))
        if peers is None:
            peers = model.peers[_kind(card)] = Peers(LatencyModel(prior_of(card.engine)))
        worker = Worker(card, self.index.add_worker(), LatencyModel(peers.expected()))
        if old is not None:
            self._forget_blocks(old)
            model.peers[_kind(old.card)].unmeasured.pop(card.worker_id, None)
            if old.latency.num_rows:
                worker.latency.expect(old.latency.timing, PEER_ROWS)
            worker.resyncs = old.resyncs
            worker.reachable = old.reachable and old.card.address == card.address
        model.workers[card.worker_id] = worker
        if not worker.latency.timing.calibrated:
            peers.unmeasured[card.worker_id] = worker
        if old is not None:
            for left in self.on_leave:
                left(model_name, old)
        for joined in self.on_join:
            joined(model_name, worker)
        self._eligibility_changed(model)
        return worker

    def leave(self, model_name: str, worker_id: str) -> None:
        """The worker is gone, with all it held. Unknown ids are ignored."""
        model = self.models[model_name]
        model.refused.pop(worker_id, None)
        worker = model.workers.pop(worker_id, None)
        if worker is None:
            return
        model.peers[_kind(worker.card)].unmeasured.pop(worker_id, None)
        self._forget_blocks(worker)
        for left in self.on_leave:
            left(model_name, worker)
        self._eligibility_changed(model)

    def refuse(self, model_name: str, card: WorkerCard, reason: str) -> None:
        """The worker may not serve: it is shown as refused, and said once per generation."""
        model = self.models[model_name]
        refused = Refused(card, reason)
        if model.refused.get(card.worker_id) == refused:
            return
        self.leave(model_name, card.worker_id)
        model.refused[card.worker_id] = refused
        self.counters.refusals += 1
        name = f"{card.worker_id} (generation {card.generation}, {card.address})"
        log.error("worker %s of model %s is refused: %s", name, model_name, reason)

    def load_blocks(
        self, worker: Worker, ids: Mapping[str, Iterable[int]], sequence: int, cause: str
    ) -> Iterator[None]:
        """Make the worker own exactly `ids`, by tier, as of event `sequence`, slice by slice.

        What it owned before counts until all is loaded. The caller lets others run
        between slices.
        """
        worker.resyncs += 1
        worker.last_resync_cause = cause
        self.counters.resyncs[cause.partition(":")[0]] += 1
        before = worker.slot
        is_first = not any(self.num_owned(worker).values())
        slot = before if is_first else self.index.add_worker()
        try:
            for tier, number in _TIER_NUMBERS.items():
                for some in _slices(list(ids.get(tier, ()))):
                    if worker.has_left:
                        return
                    self.index.add(slot, some, number)
                    yield
            if not worker.has_left:
                worker.slot = slot
                worker.sequence = sequence
                worker.published = max(worker.published, sequence)
        finally:
            if not is_first:
                # Half loaded or replaced, one of the two is nobody's.
                self.index.remove_worker(before if worker.slot == slot else slot)

    def apply(self, worker: Worker, event: Event) -> None:
        """The next event of the worker, whose `sequence` follows the last."""
        tier = _TIER_NUMBERS.get(event.tier)
        if tier is not None:
            self.index.remove(worker.slot, event.removed, tier)
            self.index.add(worker.slot, event.stored, tier)
        worker.sequence = event.sequence
        worker.published = max(worker.published, event.sequence)
        self.counters.events += 1

    def num_owned(self, worker: Worker) -> dict[str, int]:
        """How many blocks the worker holds, by tier."""
        return {
            tier: self.index.num_owned(worker.slot, number)
            for tier, number in _TIER_NUMBERS.items()
            if tier in worker.card.tiers
        }

    def owned(self, worker: Worker) -> dict[str, set[int]]:
        """Which blocks the worker holds, by tier. For checks: it reads the whole index."""
        return {
            tier: self.index.owned(worker.slot, _TIER_NUMBERS[tier])
            for tier in self.num_owned(worker)
        }

    def report(self, model_name: str, worker_id: str, load: ReportedLoad) -> None:
        """The worker's health stream said this: it is reachable."""
        worker = self.worker(model_name, worker_id)
        if worker is None:
            return
        was = worker.reachable, worker.load.draining
        worker.reachable = True
        worker.load = load
        self._measure(self.models[model_name], worker, load.totals)
        for reported in self.on_report:
            reported(worker)
        if was != (True, load.draining):
            log.info("worker %s answers%s", worker_id, ", draining" if load.draining else "")
            self._eligibility_changed(self.models[model_name])

    def _measure(self, model: Model, worker: Worker, totals: Totals) -> None:
        """Learn from the worker's steps, for its peers too."""
        new = worker.latency.observe(totals)
        if new is None:
            return
        peers = model.peers[_kind(worker.card)]
        peers.latency.learn(new)
        worker.latency.expect(peers.latency.timing, PEER_ROWS)
        worker.latency.learn(new)
        peers.unmeasured.pop(worker.key.worker_id, None)
        num_rows = peers.latency.num_rows
        # At the first rows, then ever more rarely: later ones change little.
        for other in peers.unmeasured.values() if not num_rows & (num_rows - 1) else ():
            other.latency.expect(peers.expected())
            for expected in self.on_timing:
                expected(other)

    def unreachable(self, model_name: str, worker_id: str, reason: str) -> None:
        """The worker can't be chosen until its health stream says something again."""
        worker = self.worker(model_name, worker_id)
        if worker is not None and worker.reachable:
            log.warning("worker %s is out: %s", worker_id, reason)
            self.counters.outages += 1
            worker.reachable = False
            self._eligibility_changed(self.models[model_name])

    def failed(self, key: WorkerKey, reason: str) -> None:
        """A gateway found this generation of the worker failing."""
        for model in self.models.values():
            worker = model.workers.get(key.worker_id)
            if worker is not None and worker.key == key:
                self.unreachable(model.card.name, key.worker_id, reason)

    def _forget_blocks(self, worker: Worker) -> None:
        worker.has_left = True
        self.index.remove_worker(worker.slot)

    def _eligibility_changed(self, model: Model) -> None:
        eligible = tuple(
            worker
            for _, worker in sorted(model.workers.items())
            if worker.reachable and not worker.load.draining
        )
        if eligible != model.eligible:
            model.eligible = eligible
            self._changed()

    def _changed(self) -> None:
        for changed in self.on_change:
            changed()


def _kind(card: WorkerCard) -> tuple[str, int, int]:
    return card.engine, card.total_blocks, card.max_sequences


def why_refused(card: WorkerCard, model: ModelCard) -> str:
    """Why a worker may not serve `model`; empty if it may.

    Workers that disagree on any of these would never find each other's blocks, or
    find wrong ones, and nobody would notice.
    """
    wrong = disagreement(card.model, model)
    if wrong:
        return f"its {wrong}"
    if card.hash_vector != blocks.hash_vector(model.block_size).hex():
        return "it computes other block ids from the same tokens (another version?)"
    return ""


def disagreement(one: ModelCard, other: ModelCard) -> str:
    """The first of the fields that must be equal in which two cards differ, or nothing."""
    for what, mine, theirs in (
        ("model name", one.name, other.name),
        ("model revision", one.revision, other.revision),
        ("tokenizer digest", one.tokenizer_digest, other.tokenizer_digest),
        ("block size", one.block_size, other.block_size),
    ):
        if mine != theirs:
            return f"{what} is {mine}, not {theirs}"
    return ""


def _slices(ids: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(ids), SLICE_LEN):
        yield ids[start : start + SLICE_LEN]
