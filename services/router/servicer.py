"""`headrace.v1.RouterService`: messages in, the router's core, messages out.

Nothing is decided here. A decision is made at once when its call is read, so a
call costs no task; the answers that were made in one turn of the loop share a frame.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING

from headrace import telemetry
from headrace.blocks import ID_LEN
from headrace.errors import Cancelled, HeadraceError, InvalidArgument, Unavailable
from headrace.rpc.calls import CallServer, ServerCodec
from headrace.rpc.convert import model_card_to_proto
from headrace.rpc.errors import abort, from_exception
from headrace.v1 import router_pb2, router_pb2_grpc, types_pb2
from services.router import convert
from services.router.reservations import GRACE_S, WorkerKey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from headrace.telemetry import Span
    from headrace.v1.router_pb2_grpc import _MaybeAsyncIterator, _ServicerContext
    from services.router.block_table import Ids
    from services.router.policies import Policy, RoutingRequest
    from services.router.reservations import Reservation
    from services.router.service import Decision, Router

#: How long a change of load waits for company before other routers are told.
EXCHANGE_S = 0.002

#: A span tells of so many candidates at most, the first by their ids; Explain of all.
MAX_EXPLAINED = 32

_PREFILL_DONE = router_pb2.ReservationUpdate.EVENT_PREFILL_DONE
_RELEASED = router_pb2.ReservationUpdate.EVENT_RELEASED

SERVICE_NAME = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Serves `router`. `close` when the server has stopped.

    `describe` fills in what else GetFleet tells. Gateways are refused until `is_open`:
    what a router that has just started knows is less than they still know from
    before, and would replace it.
    """

    def __init__(
        self,
        router: Router,
        router_id: str,
        describe: Callable[[router_pb2.GetFleetResponse], None],
    ) -> None:
        self.router = router
        self.router_id = router_id
        self.is_open = False
        self._describe = describe
        self._hops: set[_Hop] = set()
        #: By gateway, the stream that it opened last.
        self._gateways: dict[str, _Hop] = {}
        self._fleet: router_pb2.Fleet | None = None
        #: By worker, what all plans for it have in common; made once per change of the fleet.
        self._plans: dict[WorkerKey, router_pb2.Plan] = {}
        self._graces: set[asyncio.TimerHandle] = set()
        self._admission: asyncio.Handle | None = None
        self._alarm: asyncio.TimerHandle | None = None
        router.fleet.on_change.append(self._fleet_changed)
        router.candidates.on_change = self.look

    def close(self) -> None:
        """Drop the timers."""
        for handle in (self._admission, self._alarm, *self._graces):
            if handle is not None:
                handle.cancel()

    async def Route(
        self,
        request_iterator: _MaybeAsyncIterator[router_pb2.RouteRequest],
        context: _ServicerContext,
    ) -> AsyncIterator[router_pb2.RouteResponse]:
        """One gateway's stream."""
        if not self.is_open:
            await abort(context, Unavailable("the router is still looking for its workers"))
        hop = _Hop(self)
        self._hops.add(hop)
        try:
            async for frame in hop.server.frames(request_iterator):
                yield frame
        except HeadraceError as error:
            await abort(context, error)
        finally:
            self._hops.discard(hop)
            self._lost(hop)

    async def SelectWorker(
        self, request: router_pb2.SelectWorkerRequest, context: _ServicerContext
    ) -> router_pb2.SelectWorkerResponse:
        """The plan, without a reservation."""
        try:
            ids, routing = self._read(request)
            decision = self.router.select(request.model, ids, routing)
        except HeadraceError as error:
            await abort(context, error)
        return router_pb2.SelectWorkerResponse(plan=self.plan(decision))

    async def Explain(
        self, request: router_pb2.ExplainRequest, context: _ServicerContext
    ) -> router_pb2.ExplainResponse:
        """Every worker as the policy sees it for this request."""
        try:
            ids, routing = self._read(request.select)
            workers, choice = self.router.explain(request.select.model, ids, routing)
        except HeadraceError as error:
            await abort(context, error)
        queue = self.router.waiting.state(request.select.model, _now())
        return convert.explanation(workers, choice, routing, self.router.policy.name, queue)

    async def GetFleet(
        self, request: router_pb2.GetFleetRequest, context: _ServicerContext
    ) -> router_pb2.GetFleetResponse:
        """What the router believes."""
        response = convert.fleet_state(self.router, _now())
        self._describe(response)
        return response

    async def WatchLoads(
        self, request: router_pb2.WatchLoadsRequest, context: _ServicerContext
    ) -> AsyncIterator[router_pb2.WatchLoadsResponse]:
        """What is reserved here, for another router."""
        is_due = asyncio.Event()
        reservations = self.router.reservations
        changes = reservations.follow(is_due.set)
        try:
            while True:
                is_due.clear()
                loads = [(key, reservations.load(key)) for key in changes.take()]
                yield convert.loads(self.router_id, loads)
                await is_due.wait()
                # What changes in the meantime shares the frame.
                await asyncio.sleep(EXCHANGE_S)
        finally:
            reservations.unfollow(changes)

    def route(
        self, gateway_id: str, call: router_pb2.RouteCall, ids: Ids | None
    ) -> Decision | None:
        """The choice for a call, reserved; None if it waits. Raises a HeadraceError.

        `ids` are the call's, if they are read already.
        """
        select = call.select
        ids, request = convert.routing_request(select, self.router, ids)
        decision = self.router.route(gateway_id, call.id, select.model, ids, request, _now())
        if decision is None:
            self.look()
        return decision

    def look(self) -> None:
        """Who waits may have room now, or be out of time: see once this turn of the loop is over.

        What a frame holds and what else comes at once is looked at together, so that an
        earlier call of lower priority takes no place that a later one should have.
        """
        if self._admission is None and len(self.router.waiting):
            self._admission = asyncio.get_running_loop().call_soon(self._admit)

    def _admit(self) -> None:
        self._admission = None
        for gateway_id, request_id, outcome in self.router.admit(_now()):
            hop = self._gateways.get(gateway_id)
            if hop is None or not hop.answer(request_id, outcome):
                self.router.cancel(gateway_id, request_id)
        # What was placed has called `look` itself: there may be room for more.
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self.router.next_at < math.inf:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_at(self.router.next_at, self._admit)

    def opened(self, hop: _Hop, announced: Iterable[tuple[int, Reservation]]) -> None:
        """The gateway's stream is this one now, and it has `announced` in flight."""
        self._gateways[hop.gateway_id] = hop
        self.router.open(hop.gateway_id, hop, announced, _now())
        if len(self.router.waiting):
            self._begin_grace()

    def _read(self, select: router_pb2.SelectWorkerRequest) -> tuple[Ids, RoutingRequest]:
        return convert.routing_request(select, self.router)

    def plan(self, decision: Decision) -> router_pb2.Plan:
        """The decision as a plan of one leg, valid until the next call: it is changed in place."""
        worker = decision.worker
        plan = self._plans.get(worker.key)
        if plan is None:
            plan = self._plans[worker.key] = convert.plan(worker.card, self.router.policy.name)
        plan.matched_tokens = decision.matched_tokens
        plan.predicted_ttft_ms = decision.predicted_ttft_ms
        return plan

    def fleet(self) -> router_pb2.Fleet:
        """All models, and the workers that can be chosen; made once per change."""
        if self._fleet is None:
            self._fleet = router_pb2.Fleet(
                models=[
                    router_pb2.FleetModel(
                        card=model_card_to_proto(model.card),
                        workers=[convert.worker_ref(worker.card) for worker in model.eligible],
                    )
                    for _, model in sorted(self.router.fleet.models.items())
                ]
            )
        return self._fleet

    def _fleet_changed(self) -> None:
        self._fleet = None
        self._plans.clear()
        for hop in self._hops:
            hop.push_fleet()
        self.look()

    def _lost(self, hop: _Hop) -> None:
        """The gateway may come back within the grace; then its reservations end."""
        if not hop.gateway_id:
            return
        if self._gateways.get(hop.gateway_id) is hop:
            del self._gateways[hop.gateway_id]
        self.router.lost(hop.gateway_id, hop, _now())
        self._begin_grace()

    def _begin_grace(self) -> None:
        end_at = _now() + GRACE_S

        def end() -> None:
            self._graces.discard(grace)
            self.router.expire(end_at)

        grace = asyncio.get_running_loop().call_at(end_at, end)
        self._graces.add(grace)


class _Hop(
    ServerCodec[
        router_pb2.RouteRequest,
        router_pb2.RouteResponse,
        router_pb2.RouteCall,
        router_pb2.RouteResult,
    ]
):
    """One gateway's stream: its frames, and whose reservations they make."""

    def __init__(self, servicer: RouterServicer) -> None:
        self.gateway_id = ""
        self.server = CallServer(self, self._route)
        self._servicer = servicer
        self._router = servicer.router
        self._fleet_due = False
        #: The calls that wait, and those of them that the gateway was not told of.
        self._waits: dict[int, asyncio.Future[Decision]] = {}
        self._told: list[int] = []
        #: By call, the ids of those of the frame that is read now.
        self._ahead: dict[int, Ids] = {}
        self.push_fleet()

    def push_fleet(self) -> None:
        """Send the fleet with the next frame."""
        self._fleet_due = True
        self.server.wake()

    def calls(
        self, request: router_pb2.RouteRequest
    ) -> tuple[Iterable[router_pb2.RouteCall], Sequence[types_pb2.Chunk], Sequence[int]]:
        """Take what else the frame holds, and return its calls."""
        if request.HasField("open"):
            self._open(request.open)
        elif not self.gateway_id:
            raise InvalidArgument("a Route stream must begin with `open`", field="open")
        reservations = self._router.reservations
        for failure in request.failures:
            key = WorkerKey(failure.worker_id, failure.generation)
            self._router.fleet.failed(key, f"{self.gateway_id} says: {failure.reason}")
        for told in request.adopted:
            reservations.reserve(self.gateway_id, *convert.reservation(told))
        for update in request.updates:
            event = update.event
            if event == _PREFILL_DONE:
                reservations.prefill_done(self.gateway_id, update.id)
            elif event == _RELEASED:
                reservations.release(self.gateway_id, update.id)
        for call_id in request.cancels:
            self._waits.pop(call_id, None)
            self._router.cancel(self.gateway_id, call_id)
        self._ahead.clear()
        if len(request.calls) > 1:
            self._look_ahead(request.calls)
        return request.calls, request.chunks, request.cancels

    def parse_call(self, data: bytes) -> router_pb2.RouteCall:
        """See ServerCodec."""
        return router_pb2.RouteCall.FromString(data)

    def has_more(self) -> bool:
        """See ServerCodec."""
        return self._fleet_due or bool(self._told)

    def response(
        self, results: list[router_pb2.RouteResult], chunks: list[types_pb2.Chunk]
    ) -> router_pb2.RouteResponse:
        """See ServerCodec. Results are always short: there are no chunks."""
        response = router_pb2.RouteResponse(results=results)
        if self._told:
            response.waiting.extend(self._told)
            self._told.clear()
        if self._fleet_due:
            self._fleet_due = False
            response.fleet.CopyFrom(self._servicer.fleet())
        return response

    def failure(self, call_id: int, error: types_pb2.Error) -> router_pb2.RouteResult:
        """See ServerCodec."""
        return router_pb2.RouteResult(id=call_id, error=error)

    def _open(self, opening: router_pb2.RouteOpen) -> None:
        if not opening.gateway_id:
            raise InvalidArgument("gateway_id must not be empty", field="open.gateway_id")
        self.gateway_id = opening.gateway_id
        announced = (convert.reservation(told) for told in opening.reservations)
        self._servicer.opened(self, announced)

    def answer(self, call_id: int, outcome: Decision | HeadraceError) -> bool:
        """What became of a call that waited. False if nobody waits for it any more."""
        future = self._waits.pop(call_id, None)
        if future is None or future.done():
            return False
        if isinstance(outcome, HeadraceError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return True

    def _route(
        self, call: router_pb2.RouteCall
    ) -> router_pb2.RouteResult | Awaitable[router_pb2.RouteResult]:
        if telemetry.is_enabled():
            return self._traced_route(call)
        decision = self._servicer.route(self.gateway_id, call, self._ahead.get(call.id))
        if decision is None:
            return self._answered_later(call.id, self._wait(call.id))
        return self._result(call.id, decision)

    def _traced_route(
        self, call: router_pb2.RouteCall
    ) -> router_pb2.RouteResult | Awaitable[router_pb2.RouteResult]:
        span = telemetry.start_span(
            "router.select", call.traceparent, kind=telemetry.SpanKind.SERVER
        )
        try:
            decision = self._servicer.route(self.gateway_id, call, self._ahead.get(call.id))
        except Exception as error:
            telemetry.end_with_error(span, from_exception(error))
            raise
        if decision is None:
            state = self._router.waiting.state(call.select.model, _now())
            span.add_event("waits", {"waiting": state.waiting, "placed_per_s": state.per_s})
            return self._answered_later(call.id, self._wait(call.id), span)
        _describe(span, self._router.policy, decision)
        span.end()
        return self._result(call.id, decision)

    def _look_ahead(self, calls: Sequence[router_pb2.RouteCall]) -> None:
        """Where the index is asked for all calls of a frame at once; bad ids are said later."""
        for call in calls:
            packed = call.select.block_ids
            if packed and not len(packed) % ID_LEN:
                self._ahead[call.id] = convert.short_ids(packed)
        if self._ahead:
            self._router.fleet.index.look_ahead(list(self._ahead.values()))

    def _wait(self, call_id: int) -> asyncio.Future[Decision]:
        """The call is in the router's line: its gateway is told, and waits as long as it can."""
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._waits[call_id] = future
        self._told.append(call_id)
        self.server.wake()
        return future

    async def _answered_later(
        self, call_id: int, future: asyncio.Future[Decision], span: Span | None = None
    ) -> router_pb2.RouteResult:
        try:
            decision = await future
        except BaseException as error:
            # A cancellation, too: the span must end.
            if span is not None:
                telemetry.end_with_error(span, _cause(error))
            raise
        if span is not None:
            _describe(span, self._router.policy, decision)
            span.end()
        return self._result(call_id, decision)

    def _result(self, call_id: int, decision: Decision) -> router_pb2.RouteResult:
        result = router_pb2.RouteResult(id=call_id)
        result.plan.CopyFrom(self._servicer.plan(decision))
        return result


def _cause(error: BaseException) -> HeadraceError:
    if isinstance(error, asyncio.CancelledError):
        return Cancelled("the gateway cancelled, or left")
    return from_exception(error)


def _describe(span: Span, policy: Policy, decision: Decision) -> None:
    span.set_attributes(
        {
            "policy": policy.name,
            "worker": decision.worker.key.worker_id,
            "matched_tokens": decision.matched_tokens,
            "predicted_ttft_ms": decision.predicted_ttft_ms,
            "candidates": len(decision.candidates),
        }
    )
    if span.is_recording():
        # By worker, what the policy counted for it, in ms by name: the smallest sum won.
        parts = policy.explain(decision.request, decision.candidates[:MAX_EXPLAINED])
        said = zip(decision.candidates, parts, strict=False)
        span.set_attribute("parts", json.dumps({c.worker_id: _rounded(p) for c, p in said}))


def _rounded(parts: dict[str, float]) -> dict[str, float]:
    return {name: round(ms, 3) for name, ms in parts.items()}


def _now() -> float:
    return asyncio.get_running_loop().time()
