"""Bursts of requests through the routers' real core, in virtual time.

Eight workers, requests of skewed prefix families that come in bursts, one router or
several. What takes time in a mesh takes it here: a router's loads reach the others as
late as `WatchLoads` brings them (`EXCHANGE_S` and a hop), a worker's blocks all routers
`EVENT_MS` after its prefill, and its own word of its load every `REPORT_MS`. Decisions,
reservations, index and the gateways' choice of a router are the services' own code.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from headrace.registry import ModelCard, WorkerCard
from services.gateway.peers.rendezvous import in_order
from services.router.fleet import Fleet, ReportedLoad
from services.router.latency_model import Totals
from services.router.policies import load_policy
from services.router.service import Router
from services.router.servicer import EXCHANGE_S

if TYPE_CHECKING:
    from collections.abc import Callable

#: What a frame of loads takes from router to router.
HOP_MS = 1.0
EVENT_MS = 20.0
BURST_MS = 10.0
REPORT_MS = 500.0
NUM_WORKERS = 8
BLOCK_SIZE = 16
PREFILL_MS_PER_TOKEN = 0.02
STEP_MS = 10.0
_GATEWAY = "gateway"
MODEL = ModelCard(
    name="m", revision="r", tokenizer_digest="d", context_len=65536, block_size=BLOCK_SIZE
)


@dataclass(frozen=True)
class Spread:
    """How unevenly active requests lay, on average over time: in requests."""

    #: Standard deviation over the workers.
    deviation: float
    #: Most less least loaded worker.
    span: float
    #: Requests active on a worker, on average: the same work was done.
    mean: float
    matched: float


class _Member:
    """One router, and what identifies it to gateways. `on_change`: others are to be told."""

    def __init__(self, number: int, on_change: Callable[[_Member], None]) -> None:
        self.seed = random.Random(number).getrandbits(64)
        fleet = Fleet()
        self.router = Router(fleet, load_policy("kv"), first_turn=self.seed % 1000)
        fleet.set_model(MODEL)
        for worker in range(NUM_WORKERS):
            name = f"w{worker}"
            fleet.join(MODEL.name, WorkerCard(name, 1, "a:1", MODEL, "sim", "", 1))
        opened = self.router.reservations
        opened.open(_GATEWAY, self, ())
        self.changes = opened.follow(lambda: on_change(self))


class Bursts:
    """`run` once."""

    def __init__(self, num_routers: int, seed: int, duration_ms: float = 6000.0) -> None:
        self._random = random.Random(seed)
        self._members = [_Member(number, self._changed) for number in range(num_routers)]
        self._end_ms = duration_ms
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._active = [0] * NUM_WORKERS
        self._prefill_free = [0.0] * NUM_WORKERS
        self._totals = [Totals()] * NUM_WORKERS
        self._samples: list[tuple[float, int, float]] = []
        self._matched: list[float] = []
        self._ids = itertools.count(1)

    def run(self) -> Spread:
        """Everything, to the end."""
        self._plan_arrivals()
        for period, action in ((REPORT_MS, self._report), (1.0, self._sample)):
            at = 0.0
            while at < self._end_ms:
                self._at(at, action)
                at += period
        while self._queue:
            self._now, _, action = heapq.heappop(self._queue)
            action()
        for member in self._members:
            assert len(member.router.reservations) == 0
        deviations, spans, means = zip(*self._samples, strict=True)
        return Spread(fmean(deviations), fmean(spans), fmean(means), fmean(self._matched))

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), action))

    def _plan_arrivals(self) -> None:
        """A burst every 200 ms, of 20 to 100 requests within `BURST_MS`, and some between."""
        families = range(1, 41)
        weights = [1 / rank**1.2 for rank in families]
        at = 1.0
        while at < self._end_ms * 0.9:
            for _ in range(self._random.randint(20, 100)):
                family = self._random.choices(families, weights)[0]
                self._plan_arrival(at + self._random.random() * BURST_MS, family)
            for _ in range(10):
                family = self._random.choices(families, weights)[0]
                self._plan_arrival(at + self._random.random() * 200, family)
            at += 200

    def _plan_arrival(self, at: float, family: int) -> None:
        shared = random.Random(family)
        prompt = [shared.getrandbits(64) for _ in range(8 + family % 5 * 16)]
        prompt += [self._random.getrandbits(64) for _ in range(8)]
        num_steps = 1 + int(self._random.expovariate(1 / 40))
        self._at(at, lambda: self._arrive(prompt, num_steps))

    def _arrive(self, prompt: list[int], num_steps: int) -> None:
        member = in_order(prompt[3], self._members)[0]
        router = member.router
        num_tokens = len(prompt) * BLOCK_SIZE + 5
        request = router.request(MODEL.name, prompt, num_tokens, max_tokens=num_steps)
        decision = router.select(MODEL.name, prompt, request)
        call = next(self._ids)
        router.reserve(_GATEWAY, call, decision, request, prompt)
        worker = int(decision.worker.key.worker_id[1:])
        self._matched.append(decision.matched_tokens / request.num_tokens)
        self._active[worker] += 1
        num_tokens = request.num_tokens - decision.matched_tokens
        took = num_tokens * PREFILL_MS_PER_TOKEN
        done = max(self._now, self._prefill_free[worker]) + took
        self._prefill_free[worker] = done
        self._at(done, lambda: self._prefilled(member, call, worker, prompt, num_tokens, took))
        self._at(done + num_steps * STEP_MS, lambda: self._over(member, call, worker, num_steps))

    def _prefilled(
        self, member: _Member, call: int, worker: int, prompt: list[int], tokens: int, took: float
    ) -> None:
        member.router.reservations.prefill_done(_GATEWAY, call)
        self._work(worker, tokens, took, 0)
        self._at(self._now + EVENT_MS, lambda: self._publish(worker, prompt))

    def _over(self, member: _Member, call: int, worker: int, num_steps: int) -> None:
        member.router.reservations.release(_GATEWAY, call)
        self._active[worker] -= 1
        self._work(worker, 0, 0.0, num_steps)

    def _work(self, worker: int, tokens: int, took: float, steps: int) -> None:
        was = self._totals[worker]
        self._totals[worker] = Totals(
            step_ms=was.step_ms + took + steps * STEP_MS,
            prefill_steps=was.prefill_steps + (tokens > 0),
            prefill_tokens=was.prefill_tokens + tokens,
            prefill_squares=was.prefill_squares + tokens * tokens,
            decode_steps=was.decode_steps + steps,
            decode_sequences=was.decode_sequences + steps,
        )

    def _publish(self, worker: int, prompt: list[int]) -> None:
        for member in self._members:
            fleet = member.router.fleet
            known = fleet.worker(MODEL.name, f"w{worker}")
            assert known is not None
            fleet.index.add(known.slot, prompt)

    def _changed(self, member: _Member) -> None:
        self._at(self._now + EXCHANGE_S * 1000, lambda: self._tell(member))

    def _tell(self, member: _Member) -> None:
        reservations = member.router.reservations
        loads = [(key, replace(reservations.load(key))) for key in member.changes.take()]

        def arrive() -> None:
            for other in self._members:
                if other is not member:
                    other.router.peers.said(str(member.seed), loads)

        self._at(self._now + HOP_MS, arrive)

    def _report(self) -> None:
        for number in range(NUM_WORKERS):
            load = ReportedLoad(active_sequences=self._active[number], totals=self._totals[number])
            for member in self._members:
                member.router.fleet.report(MODEL.name, f"w{number}", load)

    def _sample(self) -> None:
        active = self._active
        if any(active):
            self._samples.append((pstdev(active), max(active) - min(active), fmean(active)))


def compare(seeds: range, duration_ms: float = 6000.0) -> tuple[list[Spread], list[Spread]]:
    """The same requests through one router and through four, for each seed."""
    one = [Bursts(1, seed, duration_ms).run() for seed in seeds]
    return one, [Bursts(4, seed, duration_ms).run() for seed in seeds]
