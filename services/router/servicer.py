"""`headrace.v1.RouterService`: messages in, the router's core, messages out.

Nothing is decided here. A decision is made at once when its call is read, so a
call costs no task; the answers that were made in one turn of the loop share a frame.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from headrace import telemetry
from headrace.errors import HeadraceError, InvalidArgument, Unavailable
from headrace.rpc.calls import CallServer, ServerCodec
from headrace.rpc.convert import model_card_to_proto
from headrace.rpc.errors import abort, from_exception
from headrace.v1 import router_pb2, router_pb2_grpc, types_pb2
from services.router import convert
from services.router.reservations import GRACE_S, WorkerKey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from headrace.telemetry import Span
    from headrace.v1.router_pb2_grpc import _MaybeAsyncIterator, _ServicerContext
    from services.router.block_table import Ids
    from services.router.policies import RoutingRequest
    from services.router.service import Decision, Router

#: How long a change of load waits for company before other routers are told.
EXCHANGE_S = 0.002

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
        self._fleet: router_pb2.Fleet | None = None
        self._graces: set[asyncio.TimerHandle] = set()
        router.fleet.on_change.append(self._fleet_changed)

    def close(self) -> None:
        """Drop the timers."""
        for grace in self._graces:
            grace.cancel()

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
            _, decision = self.decide(request)
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
        return convert.explanation(workers, choice, routing, self.router.policy.name)

    async def GetFleet(
        self, request: router_pb2.GetFleetRequest, context: _ServicerContext
    ) -> router_pb2.GetFleetResponse:
        """What the router believes."""
        response = convert.fleet_state(self.router)
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

    def decide(self, select: router_pb2.SelectWorkerRequest) -> tuple[RoutingRequest, Decision]:
        """The choice for a message, and what it was read as. Raises a HeadraceError."""
        ids, request = self._read(select)
        return request, self.router.select(select.model, ids, request)

    def _read(self, select: router_pb2.SelectWorkerRequest) -> tuple[Ids, RoutingRequest]:
        return convert.routing_request(select, self.router.turn(select.model))

    def plan(self, decision: Decision) -> router_pb2.Plan:
        """The decision as a plan of one leg."""
        return convert.plan(
            decision.worker.card,
            decision.matched_tokens,
            decision.predicted_ttft_ms,
            self.router.policy.name,
        )

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
        for hop in self._hops:
            hop.push_fleet()

    def _lost(self, hop: _Hop) -> None:
        """The gateway may come back within the grace; then its reservations end."""
        if not hop.gateway_id:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        self.router.reservations.lost(hop.gateway_id, hop, now)

        def end() -> None:
            self._graces.discard(grace)
            self.router.reservations.expire(now + GRACE_S)

        grace = loop.call_later(GRACE_S, end)
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
            if update.event == router_pb2.ReservationUpdate.EVENT_PREFILL_DONE:
                reservations.prefill_done(self.gateway_id, update.id)
            elif update.event == router_pb2.ReservationUpdate.EVENT_RELEASED:
                reservations.release(self.gateway_id, update.id)
        for call_id in request.cancels:
            # Its answer and the cancel crossed: nobody will release it.
            reservations.release(self.gateway_id, call_id)
        return request.calls, request.chunks, request.cancels

    def parse_call(self, data: bytes) -> router_pb2.RouteCall:
        """See ServerCodec."""
        return router_pb2.RouteCall.FromString(data)

    def has_more(self) -> bool:
        """See ServerCodec."""
        return self._fleet_due

    def response(
        self, results: list[router_pb2.RouteResult], chunks: list[types_pb2.Chunk]
    ) -> router_pb2.RouteResponse:
        """See ServerCodec. Results are always short: there are no chunks."""
        response = router_pb2.RouteResponse(results=results)
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
        self._router.reservations.open(self.gateway_id, self, announced)

    def _route(self, call: router_pb2.RouteCall) -> router_pb2.RouteResult:
        if telemetry.is_enabled():
            return self._traced_route(call)
        request, decision = self._servicer.decide(call.select)
        self._router.reserve(self.gateway_id, call.id, decision, request)
        return router_pb2.RouteResult(id=call.id, plan=self._servicer.plan(decision))

    def _traced_route(self, call: router_pb2.RouteCall) -> router_pb2.RouteResult:
        span = telemetry.start_span(
            "router.select", call.traceparent, kind=telemetry.SpanKind.SERVER
        )
        try:
            request, decision = self._servicer.decide(call.select)
            self._router.reserve(self.gateway_id, call.id, decision, request)
        except Exception as error:
            telemetry.end_with_error(span, from_exception(error))
            raise
        _describe(span, self._router.policy.name, decision)
        span.end()
        return router_pb2.RouteResult(id=call.id, plan=self._servicer.plan(decision))


def _describe(span: Span, policy: str, decision: Decision) -> None:
    span.set_attributes(
        {
            "policy": policy,
            "worker": decision.worker.key.worker_id,
            "matched_tokens": decision.matched_tokens,
            "predicted_ttft_ms": decision.predicted_ttft_ms,
            "candidates": decision.num_candidates,
        }
    )
