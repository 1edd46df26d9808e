"""One router: its stream, and what this gateway has in flight by its choice.

Frames merge what waits: calls, ends of reservations, workers found dead, and
reservations taken over from a router that is gone. It knows no other router, and
chooses nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

import grpc

from headrace.rpc.calls import CallClient, ClientCodec
from headrace.rpc.convert import model_card_from_proto
from headrace.rpc.options import CHANNEL
from headrace.v1 import router_pb2 as pb
from headrace.v1.router_pb2_grpc import RouterServiceStub
from headrace.v1.types_pb2 import WorkerRef
from services.gateway.fleet import FleetModel, Worker
from services.gateway.peers.reservations import Reservation, ReservationBook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from headrace.v1 import types_pb2

#: How long the news of a first token or an end may wait for company.
_UPDATE_S = 0.01
_MAX_UPDATES = 2000
_MAX_FAILURES = 1000


class RouterStream:
    """`start` it inside the loop, `close` it at the end.

    `on_fleet(stream, fleet)` is called with every fleet that it tells, the first of
    each connection included; `on_lost(stream)` when it can't be asked any more.
    """

    def __init__(
        self,
        address: str,
        *,
        gateway_id: str,
        on_fleet: Callable[[RouterStream, tuple[FleetModel, ...]], None],
        on_lost: Callable[[RouterStream], None],
    ) -> None:
        self.address = address
        self.book = ReservationBook()
        #: For rendezvous hashing: the same in every gateway.
        self.seed = int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8).digest())
        #: It let a call wait too long, and has said nothing since.
        self.is_slow = False
        self._on_fleet = on_fleet
        self._on_lost = on_lost
        self._has_spoken = False
        self._saying: asyncio.TimerHandle | None = None
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL)
        stub = RouterServiceStub(self._channel)
        self._codec = _Codec(gateway_id, self.book, self._hear)
        self._calls = CallClient(f"router {address}", stub.Route, self._codec, on_lost=self._lose)
        self._codec.on_waiting = self._calls.be_patient

    @property
    def connected(self) -> bool:
        """Whether it can be asked: a router that has just started refuses at first."""
        return self._calls.connected and self._has_spoken

    def start(self) -> None:
        """Connect, and stay connected."""
        self._calls.start()

    async def close(self) -> None:
        """Disconnect; calls in flight fail with Unavailable."""
        if self._saying is not None:
            self._saying.cancel()
        await self._calls.close()
        await self._channel.close()

    async def call(
        self, call: pb.RouteCall, *, timeout_s: float, patience_s: float
    ) -> pb.RouteResult:
        """Ask it. Raises its error, Unavailable when it was lost, DeadlineExceeded.

        It has `patience_s` for a call that it lets wait for a worker: it says so at once.
        """
        return await self._calls.call(call, timeout_s=timeout_s, patience_s=patience_s)

    def give_up(self) -> None:
        """Calls in flight fail with Unavailable: another router shall be asked."""
        self._calls.give_up()

    def failed(self, worker: Worker, reason: str) -> None:
        """Tell that the worker is dead or failing."""
        self._codec.failures.append((worker, reason))
        del self._codec.failures[:-_MAX_FAILURES]
        self._calls.wake()

    def say_soon(self) -> None:
        """The book has changed. Updates of several requests, and the next call, share a frame."""
        if self._saying is None:
            self._saying = asyncio.get_running_loop().call_later(_UPDATE_S, self._say)

    def _say(self) -> None:
        self._saying = None
        self._calls.wake()

    def _hear(self, fleet: tuple[FleetModel, ...] | None) -> None:
        self.is_slow = False
        if fleet is not None:
            self._has_spoken = True
            self._on_fleet(self, fleet)

    def _lose(self) -> None:
        was_connected, self._has_spoken = self._has_spoken, False
        if was_connected:
            self._on_lost(self)


def worker_from(ref: types_pb2.WorkerRef) -> Worker:
    """A worker as others name it."""
    return Worker(ref.worker_id, ref.generation, ref.address)


def _ref(worker: Worker) -> types_pb2.WorkerRef:
    return WorkerRef(
        worker_id=worker.worker_id, generation=worker.generation, address=worker.address
    )


def _fleet(fleet: pb.Fleet) -> tuple[FleetModel, ...]:
    return tuple(
        FleetModel(
            model_card_from_proto(entry.card),
            tuple(worker_from(ref) for ref in entry.workers),
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
        on_response: Callable[[tuple[FleetModel, ...] | None], None],
    ) -> None:
        self.failures: list[tuple[Worker, str]] = []
        #: Called with each call that the router lets wait for a worker.
        self.on_waiting: Callable[[int], None] = lambda _: None
        self._gateway_id = gateway_id
        self._book = book
        self._on_response = on_response

    def open(self) -> pb.RouteRequest:
        reservations = [_reservation(entry) for entry in self._book.announce()]
        opening = pb.RouteOpen(gateway_id=self._gateway_id, reservations=reservations)
        return pb.RouteRequest(open=opening)

    def has_more(self) -> bool:
        return self._book.has_updates or bool(self.failures)

    def request(
        self, calls: list[pb.RouteCall], chunks: list[types_pb2.Chunk], cancels: list[int]
    ) -> pb.RouteRequest:
        adopted = self._book.take_adopted(_MAX_UPDATES)
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
            calls=calls,
            chunks=chunks,
            cancels=cancels,
            updates=updates,
            failures=failures,
            adopted=map(_reservation, adopted),
        )

    def results(
        self, response: pb.RouteResponse
    ) -> tuple[Iterable[pb.RouteResult], Sequence[types_pb2.Chunk]]:
        self._on_response(_fleet(response.fleet) if response.HasField("fleet") else None)
        for call_id in response.waiting:
            self.on_waiting(call_id)
        return response.results, ()

    def parse_result(self, data: bytes) -> pb.RouteResult:
        return pb.RouteResult.FromString(data)
