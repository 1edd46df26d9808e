"""The routers, as the gateway sees them: block ids in, a worker out.

There is a stream to each router. All know all workers and blocks; requests of one
prefix family go to one of them, chosen by rendezvous hash, so that it sees at once
what it sent where. A router that is lost has its families and its reservations taken
over by the next. While none answers, the gateway chooses from the last fleet that it
was told of, by its own counts, and says so: once per outage in the log, every time in
`num_fallbacks`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.blocks import ID_LEN, TOKEN_LEN, block_ids
from headrace.errors import DeadlineExceeded, HeadraceError, Internal, StartupError, Unavailable
from headrace.registry import ModelCard
from headrace.v1 import router_pb2 as pb
from services.gateway.fleet import FleetModel, Plan, Worker, least_loaded
from services.gateway.peers.rendezvous import in_order
from services.gateway.peers.reservations import Reservation
from services.gateway.peers.router_stream import RouterStream, worker_from

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger("headrace.gateway")

#: Without a router, a worker found dead is tried again after this.
_RETRY_FAILED_S = 5.0
#: What the loop's clock may be behind: uvloop's has whole milliseconds.
_CLOCK_S = 0.01
#: Prompts that begin with the same so many blocks are of one family.
FAMILY_BLOCKS = 4


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
    """All routers. `start` it inside the loop, `close` it at the end.

    `on_fleet` is called with every new fleet, from whichever router it comes. Raises
    StartupError without an address.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        gateway_id: str,
        timeout_s: float,
        on_fleet: Callable[[tuple[FleetModel, ...]], None],
    ) -> None:
        if not addresses:
            raise StartupError("--router names no router")
        self.fleet: tuple[FleetModel, ...] = ()
        self.num_fallbacks = 0
        self._timeout_s = timeout_s
        self._on_fleet = on_fleet
        self._is_falling_back = False
        self._failed: dict[str, float] = {}
        self._ids = itertools.count(1)
        #: In whose book a reservation is.
        self._holders: dict[int, RouterStream] = {}
        #: Set once, by the first router that answers.
        self._heard = asyncio.Event()
        self._routers = [
            RouterStream(
                address,
                gateway_id=gateway_id,
                on_fleet=self._receive_fleet,
                on_lost=self._lose,
            )
            for address in dict.fromkeys(addresses)
        ]

    @property
    def connected(self) -> bool:
        """Whether any router can be asked."""
        return any(router.connected for router in self._routers)

    def start(self) -> None:
        for router in self._routers:
            router.start()

    async def close(self) -> None:
        await asyncio.gather(*(router.close() for router in self._routers))

    async def route(self, query: RouteQuery) -> Plan:
        """A worker for `query`, with a reservation that must be released.

        It may have to wait, as long as the query has time, while every worker is busy.
        Raises the router's error, Unavailable when nobody serves the model, or
        DeadlineExceeded when the query's own time is over.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + query.timeout_s
        await self._wait_for_any(min(self._timeout_s, query.timeout_s))
        call_id = next(self._ids)
        packed_ids = _packed_ids(query)
        order = self._in_order(packed_ids, call_id)
        call = _route_call(call_id, query, packed_ids)
        failure: HeadraceError | None = None
        for router in order:
            if not router.connected:
                continue
            left_s = end - loop.time()
            try:
                result = await router.call(
                    call, timeout_s=min(self._timeout_s, left_s), patience_s=left_s
                )
            except DeadlineExceeded as error:
                if not isinstance(error.__cause__, TimeoutError):
                    # The router's own word: no worker would be free in time.
                    raise
                self._disown(router, call_id)
                if loop.time() >= end - _CLOCK_S:
                    raise
                router.is_slow, failure = True, error
            except Unavailable as error:
                self._disown(router, call_id)
                if router.connected:
                    raise
                failure = error
            except asyncio.CancelledError:
                self._disown(router, call_id)
                raise
            else:
                self._answered()
                return self._accept(router, call_id, query, result.plan)
        if failure is not None and not self.fleet:
            raise failure
        return self._fall_back(order[0], call_id, query)

    def prefill_done(self, reservation_id: int) -> None:
        """The request's first token came."""
        holder = self._holders.get(reservation_id)
        if holder is not None:
            holder.book.prefill_done(reservation_id)
            holder.say_soon()

    def release(self, reservation_id: int) -> None:
        """The request is over on that worker."""
        holder = self._holders.pop(reservation_id, None)
        if holder is not None:
            holder.book.release(reservation_id)
            holder.say_soon()

    def report_failure(self, worker: Worker, reason: str) -> None:
        """`worker` is dead or failing: nobody should be sent there."""
        self._failed[worker.worker_id] = asyncio.get_running_loop().time() + _RETRY_FAILED_S
        for router in self._routers:
            router.failed(worker, reason)

    async def _wait_for_any(self, timeout_s: float) -> None:
        """At the start, before any router answered; raises Unavailable."""
        if self._heard.is_set():
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._heard.wait()
        except TimeoutError:
            names = ", ".join(router.address for router in self._routers)
            raise Unavailable(f"router {names} is not reachable", retry_after_ms=500) from None

    def _in_order(self, packed_ids: bytes, call_id: int) -> list[RouterStream]:
        """The routers to ask for a prompt, in turn."""
        if len(self._routers) == 1:
            return self._routers
        # An id stands for all blocks before it, too. Prompts below one block spread.
        last = min(len(packed_ids) // ID_LEN, FAMILY_BLOCKS) * ID_LEN
        family = int.from_bytes(packed_ids[last - 8 : last]) if last else call_id
        order = in_order(family, self._routers)
        return sorted(order, key=lambda router: router.is_slow)

    def _workers(self, model: str) -> tuple[Worker, ...]:
        return next((entry.workers for entry in self.fleet if entry.card.name == model), ())

    def _receive_fleet(self, router: RouterStream, fleet: tuple[FleetModel, ...]) -> None:
        self.fleet = fleet
        self._failed.clear()
        self._heard.set()
        for other in self._routers:
            if not other.connected:
                self._hand_over(other, router)
        self._on_fleet(fleet)

    def _lose(self, router: RouterStream) -> None:
        """Its families go to the next; the only one is waited for."""
        for other in in_order(router.seed, self._routers):
            if other.connected:
                self._hand_over(router, other)
                router.give_up()
                return

    def _hand_over(self, lost: RouterStream, to: RouterStream) -> None:
        reservations = lost.book.hand_over()
        for reservation in reservations:
            self._holders[reservation.id] = to
            to.book.adopt(reservation)
        if reservations:
            log.info(
                "router %s is gone: its %d requests are announced to %s",
                lost.address, len(reservations), to.address,
            )  # fmt: skip
            to.say_soon()

    def _answered(self) -> None:
        if self._is_falling_back:
            log.info("the router answers again, after %d choices without it", self.num_fallbacks)
            self._is_falling_back = False

    def _accept(self, router: RouterStream, call_id: int, query: RouteQuery, plan: pb.Plan) -> Plan:
        if len(plan.legs) != 1 or plan.legs[0].role != pb.Leg.ROLE_COMPLETE:
            self._disown(router, call_id)
            log.error("the router sent a plan of %d legs, unknown here", len(plan.legs))
            raise Internal
        leg = plan.legs[0]
        worker = worker_from(leg.worker)
        self._reserve(router, call_id, query, worker, plan.matched_tokens)
        return Plan(worker, call_id, plan.matched_tokens, leg.hand_off)

    def _fall_back(self, router: RouterStream, call_id: int, query: RouteQuery) -> Plan:
        """Choose without a router; `router` will be told of it when it answers."""
        now = asyncio.get_running_loop().time()
        dead = {worker_id for worker_id, until in self._failed.items() if until > now}
        workers = self._workers(query.card.name)
        load: Counter[str] = Counter()
        for each in self._routers:
            load.update(each.book.load)
        worker = least_loaded(workers, load, query.exclude | dead)
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
        self._reserve(router, call_id, query, worker, 0)
        return Plan(worker, call_id)

    def _reserve(
        self, router: RouterStream, call_id: int, query: RouteQuery, worker: Worker, matched: int
    ) -> None:
        num_blocks = -(-query.num_tokens // query.card.block_size)
        self._holders[call_id] = router
        router.book.add(
            Reservation(
                id=call_id,
                worker=worker,
                model=query.card.name,
                prefill_tokens=max(0, query.num_tokens - matched),
                blocks=num_blocks + query.num_sequences,
                num_sequences=query.num_sequences,
            )
        )

    def _disown(self, router: RouterStream, call_id: int) -> None:
        router.book.disown(call_id)
        router.say_soon()


def _packed_ids(query: RouteQuery) -> bytes:
    if query.block_ids is not None:
        return query.block_ids
    return b"".join(block_ids(query.token_ids, query.card.block_size, query.namespace_key))


def _route_call(call_id: int, query: RouteQuery, packed_ids: bytes) -> pb.RouteCall:
    return pb.RouteCall(
        id=call_id,
        traceparent=query.traceparent,
        select=pb.SelectWorkerRequest(
            model=query.card.name,
            block_ids=packed_ids,
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
