"""The simulation itself: a queue of things that happen, and nothing that waits.

    arrival ─hop─▶ router: route ─hop─▶ worker ─▶ steps ─▶ tokens ─hop─▶ client
                     ▲                     │
                     └── blocks, load, reservations: each with its delay

All that happens at one moment happens in the order in which it was foreseen, so that
equal inputs give equal results. Times inside are in seconds.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from headrace.errors import (
    DeadlineExceeded,
    HeadraceError,
    ResourceExhausted,
    Unavailable,
)
from headrace.params import SamplingParams
from headrace.registry import DEVICE_TIER
from services.replay.simulation import (
    COMPLETED,
    FAILED,
    REFUSED,
    SimulationResult,
)
from services.replay.simulation_calls import Call, Gaps
from services.replay.simulation_content import NAMESPACE, Content, Tokens
from services.replay.simulation_outcome import Outcome
from services.replay.simulation_routers import MODEL, Routers, gateway, worker_id
from services.replay.simulation_worker import SimulatedWorker
from services.worker.engine import SequenceRequest
from services.worker.engines.sim.timing import create

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services.replay.simulation import FleetEvent, SimulationConfig
    from services.replay.simulation_routers import RouterNode
    from services.replay.workload import Trace
    from services.router.service import Decision
    from services.worker.engine import EngineStats, SequenceEnd

#: How often a gateway asks again where no worker can be chosen, and where one failed.
_MAX_RETRIES = 120
_MAX_MIGRATIONS = 8

T = TypeVar("T")


class Simulation:
    """One run of `simulate`."""

    def __init__(
        self,
        trace: Trace,
        config: SimulationConfig,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._trace = trace
        self._config = config
        self._progress = progress or (lambda ended, total: None)
        self._timing = create(config.timing)
        self._hop = config.hop_ms / 1000
        self._queue: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = count()
        self._gaps = Gaps()
        self.routers = Routers(config)
        self._workers: dict[int, SimulatedWorker] = {}
        self._past_workers: list[SimulatedWorker] = []
        self._generations = count(1)
        self._waiting: dict[int, Call] = {}
        self._sampling: dict[int, SamplingParams] = {}
        self._outcome = Outcome(len(trace.requests))
        self._num_kv_events = 0

    def run(self) -> SimulationResult:
        """Everything, from the first arrival to the last token."""
        for number in range(self._config.num_workers):
            self._join(number, 0.0)
        for event in self._config.events:
            self.at(event.at_ms / 1000, _bound(self._fleet_event, event))
        total = len(self._trace.requests)
        report_every = max(1, total // 100)
        reported = 0
        arrivals = self._arrivals()
        upcoming = next(arrivals, None)
        queue = self._queue
        while self._outcome.num_ended < total:
            if upcoming is not None and (not queue or upcoming.arrived < queue[0][0]):
                call, upcoming = upcoming, next(arrivals, None)
                self.at(call.arrived + self._hop, _bound(self._route, call))
            elif queue:
                time, _, happen = heappop(queue)
                happen(time)
            else:
                self._give_up()
            if self._outcome.num_ended >= reported + report_every:
                reported = self._outcome.num_ended
                self._progress(reported, total)
        counters = [node.router.counters for node in self.routers.nodes]
        return self._outcome.result(
            self._config,
            self._gaps,
            self.workers(),
            kv_events=self._num_kv_events,
            decisions=sum(counter.decisions for counter in counters),
        )

    def finish(self) -> None:
        """Let happen what is still under way after the last token: reports, releases."""
        while self._queue:
            time, _, happen = heappop(self._queue)
            happen(time)

    def workers(self) -> list[SimulatedWorker]:
        """All that there were."""
        return [*self._past_workers, *self._workers.values()]

    def worker(self, number: int) -> SimulatedWorker:
        """The one that serves under that number now."""
        return self._workers[number]

    def at(self, time: float, call: Callable[[float], None]) -> None:
        """See Outside."""
        heappush(self._queue, (time, next(self._numbers), call))

    def on_first_token(self, call: Call, now: float) -> None:
        """See Outside."""
        self.at(now + 2 * self._hop, _bound(self._prefill_done, call))

    def on_end(self, worker: SimulatedWorker, call: Call, end: SequenceEnd, now: float) -> None:
        """See Outside."""
        if not call.num_migrations:
            call.cached_tokens = min(end.cached_tokens, call.request.num_tokens)
        status = FAILED if end.reason == "error" else COMPLETED
        self._outcome.end(call, status, now + self._hop, self._hop, end.error)
        self.at(now + 2 * self._hop, _bound(self._release, call))
        if worker.draining and not worker.calls:
            self._gone(worker)
            self.routers.leave(worker.number)

    def on_blocks(
        self,
        worker: SimulatedWorker,
        stored: list[int],
        removed: list[int],
        now: float,
        tier: str = DEVICE_TIER,
    ) -> None:
        """See Outside."""
        self._num_kv_events += 1

        def happen(now: float) -> None:
            self.routers.changed(worker.number, worker.generation, stored, removed, tier)

        self.at(now + self._config.kv_event_delay_ms / 1000, happen)

    def on_load(self, worker: SimulatedWorker, stats: EngineStats, now: float) -> None:
        """See Outside."""

        def happen(now: float) -> None:
            if self._workers.get(worker.number) is worker:
                self.routers.report(worker.number, stats, draining=worker.draining)
                self._admit_everywhere(now)

        self.at(now + self._config.load_report_delay_ms / 1000, happen)

    def _arrivals(self) -> Iterator[Call]:
        trace, config = self._trace, self._config
        for number, request in enumerate(trace.requests):
            content = Content(request, number, trace.block_size, config.block_size)
            arrived = request.arrival_ms / config.speed / 1000
            self._outcome.arrived[number] = arrived
            yield Call(number, request, content, arrived)

    # --- requests

    def _route(self, call: Call, now: float) -> None:
        """A gateway asks a router."""
        request = call.request
        prompt_ids = call.content.prompt_ids()
        node = call.router = self.routers.of(prompt_ids, call.number)
        asked = self.routers.request(
            node,
            prompt_ids,
            request.num_tokens,
            tenant=request.tenant,
            priority=request.priority,
            timeout_ms=request.timeout_ms,
            session_id=request.session_id,
            exclude_workers=call.failed_on,
        )
        router, owner = node.router, gateway(call.number)
        try:
            if self._config.router_queue:
                decision = router.route(owner, call.number, MODEL, prompt_ids, asked, now)
            else:
                decision = router.select(MODEL, prompt_ids, asked)
                router.reserve(owner, call.number, decision, asked, prompt_ids)
        except HeadraceError as error:
            self._refused(call, error, now)
            return
        if decision is None:
            self._waiting[call.number] = call
            self._admit(node, now)
        else:
            self._send(call, decision, now)
        if router.next_at <= now:
            # Another was displaced.
            self._admit(node, now)
        self._tell_routers(node, now)

    def _send(self, call: Call, decision: Decision, now: float) -> None:
        number = int(decision.worker.key.worker_id[1:])
        call.worker = number
        if not call.num_migrations:
            call.matched_tokens = decision.matched_tokens
            call.predicted_ttft_ms = decision.predicted_ttft_ms
        generation = decision.worker.key.generation

        def arrive(now: float) -> None:
            worker = self._workers.get(number)
            if worker is None or worker.generation != generation or worker.is_gone:
                self._migrate(call, now)
            else:
                worker.submit(call, self._sequence(call), now)

        self.at(now + self._hop, arrive)

    def _sequence(self, call: Call) -> SequenceRequest:
        request = call.request
        sampling = self._sampling.get(request.output_tokens)
        if sampling is None:
            sampling = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
            self._sampling[request.output_tokens] = sampling
        return SequenceRequest(
            sequence_id=call.number,
            prompt_ids=Tokens(call.content, request.num_tokens),  # type: ignore[arg-type]
            generated_ids=[0] * call.generated,
            sampling=sampling,
            namespace_key=NAMESPACE,
            priority=request.priority,
            tenant=request.tenant,
            timeout_ms=request.timeout_ms,
        )

    def _refused(self, call: Call, error: HeadraceError, now: float) -> None:
        if isinstance(error, Unavailable) and call.num_retries < _MAX_RETRIES:
            call.num_retries += 1
            # As a gateway does: where there is no other, one that restarted will do.
            call.failed_on = frozenset()
            wait_ms = error.retry_after_ms or 500
            self.at(now + wait_ms / 1000, _bound(self._route, call))
            return
        status = REFUSED if isinstance(error, (ResourceExhausted, DeadlineExceeded)) else FAILED
        self._outcome.end(call, status, now, self._hop, error.message)

    def _migrate(self, call: Call, now: float) -> None:
        """Its worker is gone: prompt and generated tokens go to another."""
        call.num_migrations += 1
        call.failed_on |= {worker_id(call.worker)}
        node = call.router
        assert node is not None
        node.router.reservations.release(gateway(call.number), call.number)
        if call.num_migrations > _MAX_MIGRATIONS:
            self._outcome.end(call, FAILED, now, self._hop, "failed on too many workers")
        else:
            self._route(call, now)

    def _prefill_done(self, call: Call, now: float) -> None:
        assert call.router is not None
        call.router.router.reservations.prefill_done(gateway(call.number), call.number)
        self._admit(call.router, now)
        self._tell_routers(call.router, now)

    def _release(self, call: Call, now: float) -> None:
        assert call.router is not None
        call.router.router.reservations.release(gateway(call.number), call.number)
        self._admit(call.router, now)
        self._tell_routers(call.router, now)

    def _admit(self, node: RouterNode, now: float) -> None:
        """There may be room for those who wait at the router."""
        if not len(node.router.waiting) and node.router.next_at > now:
            return
        for admitted in node.router.admit(now):
            call = self._waiting.pop(admitted.request_id)
            if isinstance(admitted.outcome, HeadraceError):
                self._refused(call, admitted.outcome, now)
            else:
                self._send(call, admitted.outcome, now)
        next_at = node.router.next_at
        if now < next_at < node.wakes_at:
            node.wakes_at = next_at
            self.at(next_at, _bound(self._wake, node))

    def _wake(self, node: RouterNode, now: float) -> None:
        node.wakes_at = math.inf
        self._admit(node, now)

    def _admit_everywhere(self, now: float) -> None:
        for node in self.routers.nodes:
            self._admit(node, now)

    def _tell_routers(self, node: RouterNode, now: float) -> None:
        """What the router reserved reaches the others a little later."""
        if node.changes is None or node.is_telling:
            return
        node.is_telling = True

        def happen(now: float) -> None:
            told = node.told()
            for other in self.routers.nodes:
                if other is not node:
                    other.router.peers.said(f"router-{node.number}", told)

        self.at(now + self._config.router_exchange_ms / 1000, happen)

    def _give_up(self) -> None:
        """Nothing will happen any more, and some requests have not ended."""
        left = list(self._waiting.values())
        if not left:
            raise RuntimeError("requests are under way, and nothing is to happen")
        for call in left:
            del self._waiting[call.number]
            self._outcome.end(call, FAILED, call.arrived, self._hop, "no worker ever had room")

    # --- workers

    def _join(self, number: int, now: float) -> None:
        generation = next(self._generations)
        self._workers[number] = SimulatedWorker(
            number, generation, self._config, self._timing, self._gaps, self, now
        )
        self.routers.join(number, generation)

    def _gone(self, worker: SimulatedWorker) -> None:
        worker.is_gone = True
        if self._workers.get(worker.number) is worker:
            del self._workers[worker.number]
            self._past_workers.append(worker)

    def _fleet_event(self, event: FleetEvent, now: float) -> None:
        worker = self._workers.get(event.worker)
        if event.kind == "join":
            if worker is None:
                self._join(event.worker, now)
                self._admit_everywhere(now)
        elif worker is None:
            return
        elif event.kind == "leave":
            worker.draining = True
            self.on_load(worker, worker.core.stats(), now)
            if not worker.calls:
                self.at(now + 1.0, _bound(self._left, worker))
        else:
            self._fail(worker, now)

    def _left(self, worker: SimulatedWorker, now: float) -> None:
        """A draining worker that had nothing to do."""
        if not worker.calls and not worker.is_gone:
            self._gone(worker)
            self.routers.leave(worker.number)

    def _fail(self, worker: SimulatedWorker, now: float) -> None:
        lost = worker.fail(now)
        self._gone(worker)

        def noticed(now: float) -> None:
            if worker.number not in self._workers:
                self.routers.leave(worker.number)
            for call in lost:
                self._migrate(call, now)
            self._admit_everywhere(now)

        self.at(now + self._config.failure_detection_ms / 1000, noticed)


def _bound(method: Callable[[T, float], None], what: T) -> Callable[[float], None]:
    return lambda now: method(what, now)
