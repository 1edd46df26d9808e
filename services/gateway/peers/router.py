"""The router, as the gateway sees it: block ids in, a worker out.

One stream carries all calls, the ends of reservations and the workers found
dead. While no router answers, the gateway chooses from the last fleet that it
was told of, by its own counts, and says so: once per outage in the log, every
time in `num_fallbacks`.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from headrace.blocks import TOKEN_LEN, block_ids
from headrace.errors import DeadlineExceeded, Internal, Unavailable
from headrace.registry import ModelCard
from headrace.rpc.calls import CallClient, ClientCodec
from headrace.rpc.convert import model_card_from_proto
from headrace.rpc.options import CHANNEL
from headrace.v1 import router_pb2 as pb
from headrace.v1.router_pb2_grpc import RouterServiceStub
from headrace.v1.types_pb2 import WorkerRef
from services.gateway.fleet import FleetModel, Plan, Worker, least_loaded
from services.gateway.peers.reservations import Reservation, ReservationBook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from headrace.v1 import types_pb2

log = logging.getLogger("headrace.gateway")

#: Without a router, a worker found dead is tried again after this.
_RETRY_FAILED_S = 5.0
#: How long the news of a first token or an end may wait for company.
_UPDATE_S = 0.01
_MAX_UPDATES = 2000
_MAX_FAILURES = 1000


@dataclass(frozen=True, slots=True)
class RouteQuery:
    """What the choice depends on."""

    card: ModelCard
    #: Prompt and what was generated of it elsewhere, u32 little-endian.
    token_ids: bytes
    namespace_key: bytes
    max_tokens: int
    num_sequences: int
    timeout_s: float
    #: Ids of token_ids' full blocks; computed if not given.
    block_ids: bytes | None = None
    tenant: str = ""
    priority: int = 0
    session_id: str = ""
    exclude: frozenset[str] = frozenset()
    traceparent: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // TOKEN_LEN


class RouterPeer:
    """One router. `start` it inside the loop, `close` it at the end.

    `on_fleet` is called with every new fleet.
    """

    def __init__(
        self,
        address: str,
        *,
        gateway_id: str,
        timeout_s: float,
        on_fleet: Callable[[tuple[FleetModel, ...]], None],
    ) -> None:
        self.fleet: tuple[FleetModel, ...] = ()
        self.num_fallbacks = 0
        self._timeout_s = timeout_s
        self._on_fleet = on_fleet
        self._is_falling_back = False
        self._failed: dict[str, float] = {}
        self._saying: asyncio.TimerHandle | None = None
        self._book = ReservationBook()
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL)
        stub = RouterServiceStub(self._channel)
        self._codec = _Codec(gateway_id, self._book, self._receive_fleet)
        self._calls = CallClient(f"router {address}", stub.Route, self._codec)

    @property
    def connected(self) -> bool:
        return self._calls.connected

    def start(self) -> None:
        self._calls.start()

    async def close(self) -> None:
        if self._saying is not None:
            self._saying.cancel()
        await self._calls.close()
        await self._channel.close()

    async def route(self, query: RouteQuery) -> Plan:
        """A worker for `query`, with a reservation that must be released.

        Raises the router's error, Unavailable when nobody serves the model, or
        DeadlineExceeded when the query's own time is over.
        """
        if not self._calls.connected and self.fleet:
            return self._fall_back(query)
        call_id = self._calls.next_id()
        limit_s = min(self._timeout_s, query.timeout_s)
        try:
            result = await self._calls.call(_route_call(call_id, query), timeout_s=limit_s)
        except DeadlineExceeded:
            self._disown(call_id)
            if limit_s == query.timeout_s or not self.fleet:
                raise
            return self._fall_back(query)
        except Unavailable:
            self._disown(call_id)
            if self._calls.connected or not self.fleet:
                raise
            return self._fall_back(query)
        except asyncio.CancelledError:
            self._disown(call_id)
            raise
        if self._is_falling_back:
            log.info("the router answers again, after %d choices without it", self.num_fallbacks)
            self._is_falling_back = False
        return self._accept(call_id, query, result.plan)

    def prefill_done(self, reservation_id: int) -> None:
        """The request's first token came."""
        self._book.prefill_done(reservation_id)
        self._say_soon()

    def release(self, reservation_id: int) -> None:
        """The request is over on that worker."""
        self._book.release(reservation_id)
        self._say_soon()

    def report_failure(self, worker: Worker, reason: str) -> None:
        """`worker` is dead or failing: nobody should be sent there."""
        self._failed[worker.worker_id] = asyncio.get_running_loop().time() + _RETRY_FAILED_S
        self._codec.failures.append((worker, reason))
        del self._codec.failures[:-_MAX_FAILURES]
        self._calls.wake()

    def _workers(self, model: str) -> tuple[Worker, ...]:
        return next((entry.workers for entry in self.fleet if entry.card.name == model), ())

    def _receive_fleet(self, fleet: tuple[FleetModel, ...]) -> None:
        self.fleet = fleet
        self._failed.clear()
        self._on_fleet(fleet)

    def _accept(self, call_id: int, query: RouteQuery, plan: pb.Plan) -> Plan:
        if len(plan.legs) != 1 or plan.legs[0].role != pb.Leg.ROLE_COMPLETE:
            self._disown(call_id)
            log.error("the router sent a plan of %d legs, unknown here", len(plan.legs))
            raise Internal
        leg = plan.legs[0]
        worker = _worker(leg.worker)
        self._reserve(call_id, query, worker, plan.matched_tokens)
        return Plan(worker, call_id, plan.matched_tokens, leg.hand_off)

    def _fall_back(self, query: RouteQuery) -> Plan:
        now = asyncio.get_running_loop().time()
        dead = {worker_id for worker_id, until in self._failed.items() if until > now}
        workers = self._workers(query.card.name)
        worker = least_loaded(workers, self._book.load, query.exclude | dead)
        if worker is None:
            raise Unavailable(
                f"no router answers, and no worker of {query.card.name} is known to live",
                retry_after_ms=1000,
            )
        self.num_fallbacks += 1
        if not self._is_falling_back:
            self._is_falling_back = True
            log.warning(
                "no router answers: falling back to the last known %d workers of %s "
                "and this gateway's own counts",
                len(workers),
                query.card.name,
            )
        call_id = self._calls.next_id()
        self._reserve(call_id, query, worker, 0)
        return Plan(worker, call_id)

    def _reserve(self, call_id: int, query: RouteQuery, worker: Worker, matched: int) -> None:
        num_blocks = -(-query.num_tokens // query.card.block_size)
        self._book.add(
            Reservation(
                id=call_id,
                worker=worker,
                model=query.card.name,
                prefill_tokens=max(0, query.num_tokens - matched),
                blocks=num_blocks + query.num_sequences,
                num_sequences=query.num_sequences,
            )
        )

    def _disown(self, call_id: int) -> None:
        self._book.disown(call_id)
        self._say_soon()

    def _say_soon(self) -> None:
        """Updates of several requests, and the next call, share a frame."""
        if self._saying is None:
            self._saying = asyncio.get_running_loop().call_later(_UPDATE_S, self._say)

    def _say(self) -> None:
        self._saying = None
        self._calls.wake()


def _route_call(call_id: int, query: RouteQuery) -> pb.RouteCall:
    packed = query.block_ids
    if packed is None:
        packed = b"".join(block_ids(query.token_ids, query.card.block_size, query.namespace_key))
    return pb.RouteCall(
        id=call_id,
        traceparent=query.traceparent,
        select=pb.SelectWorkerRequest(
            model=query.card.name,
            block_ids=packed,
            num_tokens=query.num_tokens,
            max_tokens=query.max_tokens,
            num_sequences=query.num_sequences,
            tenant=query.tenant,
            priority=query.priority,
            timeout_ms=max(1, int(query.timeout_s * 1000)),
            exclude_workers=sorted(query.exclude),
            session_id=query.session_id,
        ),
    )


def _worker(ref: types_pb2.WorkerRef) -> Worker:
    return Worker(ref.worker_id, ref.generation, ref.address)


def _ref(worker: Worker) -> types_pb2.WorkerRef:
    return WorkerRef(
        worker_id=worker.worker_id, generation=worker.generation, address=worker.address
    )


def _fleet(fleet: pb.Fleet) -> tuple[FleetModel, ...]:
    return tuple(
        FleetModel(
            model_card_from_proto(entry.card),
            tuple(_worker(ref) for ref in entry.workers),
        )
        for entry in fleet.models
    )


def _reservation(reservation: Reservation) -> pb.Reservation:
    return pb.Reservation(
        id=reservation.id,
        worker=_ref(reservation.worker),
        model=reservation.model,
        prefill_tokens=reservation.prefill_tokens,
        blocks=reservation.blocks,
        num_sequences=reservation.num_sequences,
    )


class _Codec(ClientCodec[pb.RouteRequest, pb.RouteResponse, pb.RouteCall, pb.RouteResult]):
    """Frames of the router's stream; updates and failures ride along with calls."""

    def __init__(
        self,
        gateway_id: str,
        book: ReservationBook,
        on_fleet: Callable[[tuple[FleetModel, ...]], None],
    ) -> None:
        self.failures: list[tuple[Worker, str]] = []
        self._gateway_id = gateway_id
        self._book = book
        self._on_fleet = on_fleet

    def open(self) -> pb.RouteRequest:
        reservations = [_reservation(entry) for entry in self._book.announce()]
        opening = pb.RouteOpen(gateway_id=self._gateway_id, reservations=reservations)
        return pb.RouteRequest(open=opening)

    def has_more(self) -> bool:
        return self._book.has_updates or bool(self.failures)

    def request(
        self, calls: list[pb.RouteCall], chunks: list[types_pb2.Chunk], cancels: list[int]
    ) -> pb.RouteRequest:
        prefilled, released = self._book.take_updates(_MAX_UPDATES)
        done, over = (
            pb.ReservationUpdate.EVENT_PREFILL_DONE,
            pb.ReservationUpdate.EVENT_RELEASED,
        )
        updates = [pb.ReservationUpdate(id=number, event=done) for number in prefilled]
        updates += [pb.ReservationUpdate(id=number, event=over) for number in released]
        failures = [
            pb.WorkerFailure(
                worker_id=worker.worker_id, generation=worker.generation, reason=reason
            )
            for worker, reason in self.failures
        ]
        self.failures.clear()
        return pb.RouteRequest(
            calls=calls, chunks=chunks, cancels=cancels, updates=updates, failures=failures
        )

    def results(
        self, response: pb.RouteResponse
    ) -> tuple[Iterable[pb.RouteResult], Sequence[types_pb2.Chunk]]:
        if response.HasField("fleet"):
            self._on_fleet(_fleet(response.fleet))
        return response.results, ()

    def parse_result(self, data: bytes) -> pb.RouteResult:
        return pb.RouteResult.FromString(data)
