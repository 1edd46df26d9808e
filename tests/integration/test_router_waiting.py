"""Requests that wait at the router while every worker is busy, over real streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from headrace import blocks
from headrace.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from headrace.v1 import router_pb2
from services.gateway.fleet import Plan
from services.gateway.peers import RouteQuery, RouterPeer
from services.router.policies.kv import QUEUE_AHEAD
from tests.integration.router_parts import (
    MODEL,
    NAMESPACE,
    FakeWorker,
    RunningRouter,
    Valkey,
    prompt,
    until,
)

LIMIT = 4
#: What fills a worker of one slot.
FULL = 1 + QUEUE_AHEAD


@pytest.fixture
async def worker(valkey: Valkey) -> AsyncIterator[FakeWorker]:
    """One, with one slot."""
    worker = await FakeWorker(valkey.url, "one", max_sequences=1).start()
    yield worker
    await worker.close()


@pytest.fixture
async def router(valkey: Valkey, worker: FakeWorker) -> AsyncIterator[RunningRouter]:
    router = await RunningRouter(valkey.url, max_waiting=LIMIT).start()
    await until("the worker answers", lambda: router.reachable("one"))
    yield router
    await router.close()


@pytest.fixture
async def gateway(router: RunningRouter) -> AsyncIterator[RouterPeer]:
    """A real gateway's end; its own patience with a silent router is short."""
    gateway = make_gateway(router)
    await until("it is connected", lambda: gateway.connected)
    yield gateway
    await gateway.close()


def make_gateway(*routers: RunningRouter, gateway_id: str = "gateway") -> RouterPeer:
    gateway = RouterPeer(
        [router.app.address for router in routers],
        gateway_id=gateway_id,
        timeout_s=0.5,
        on_fleet=lambda _: None,
    )
    gateway.start()
    return gateway


async def route(gateway: RouterPeer, seed: int = 0, timeout_s: float = 30, **fields: Any) -> Plan:
    query = RouteQuery(
        card=MODEL,
        token_ids=blocks.pack_tokens([0] * 40),
        namespace_key=NAMESPACE,
        block_ids=prompt(40, seed),
        max_tokens=10,
        num_sequences=1,
        timeout_s=timeout_s,
        **fields,
    )
    return await gateway.route(query)


async def fill(gateway: RouterPeer) -> list[Plan]:
    return [await route(gateway, seed) for seed in range(FULL)]


async def begin(router: RunningRouter, gateway: RouterPeer, **fields: Any) -> asyncio.Task[Plan]:
    """A request that is in the line now."""
    before = len(router.app.router.waiting)
    task = asyncio.create_task(route(gateway, **fields))
    await until("it waits", lambda: len(router.app.router.waiting) == before + 1)
    return task


async def test_it_waits_longer_than_a_silent_router_would_get(
    router: RunningRouter, gateway: RouterPeer
) -> None:
    plans = await fill(gateway)
    waiting = await begin(router, gateway, seed=9)
    fleet = await router.fleet()
    queue = fleet.queues[MODEL.name]
    assert (queue.waiting, queue.limit, fleet.counters.waits) == (1, LIMIT, 1)
    select = router_pb2.SelectWorkerRequest(
        model=MODEL.name, block_ids=prompt(40), num_tokens=40, num_sequences=1
    )
    explained = await router.stub.Explain(router_pb2.ExplainRequest(select=select), timeout=10)
    assert explained.queue.waiting == 1
    assert [w.saturated for w in explained.workers] == [True]
    # Longer than the gateway's timeout for a router that does not answer.
    done, _ = await asyncio.wait([waiting], timeout=1.0)
    assert not done
    gateway.release(plans[0].reservation_id)
    plan = await waiting
    assert (plan.worker.worker_id, gateway.num_fallbacks) == ("one", 0)
    for entry in (*plans[1:], plan):
        gateway.release(entry.reservation_id)
    await until("nothing is left", lambda: len(router.app.router.reservations) == 0)
    assert (await router.fleet()).counters.decisions_by_policy == {"kv": FULL + 1}


async def test_order_is_by_priority_and_deadline(
    router: RunningRouter, gateway: RouterPeer
) -> None:
    plans = await fill(gateway)
    order: list[str] = []

    def note(name: str, task: asyncio.Task[Plan]) -> None:
        def placed(done: asyncio.Task[Plan]) -> None:
            order.append(name)
            plans.append(done.result())

        task.add_done_callback(placed)

    for name, fields in (
        ("last", {"priority": -1, "timeout_s": 20}),
        ("late", {"timeout_s": 60}),
        ("soon", {"timeout_s": 30}),
        ("first", {"priority": 1, "timeout_s": 90}),
    ):
        note(name, await begin(router, gateway, **fields))
    for count in range(1, 5):
        gateway.release(plans.pop(0).reservation_id)
        await until("one more is placed", lambda count=count: len(order) == count)
    assert order == ["first", "soon", "late", "last"]


async def test_a_full_line_refuses_with_a_hint_and_yields_to_priority(
    router: RunningRouter, gateway: RouterPeer
) -> None:
    plans = await fill(gateway)
    tasks = [await begin(router, gateway) for _ in range(LIMIT)]
    with pytest.raises(ResourceExhausted) as caught:
        await route(gateway)
    assert caught.value.retry_after_ms > 0
    urgent = asyncio.create_task(route(gateway, priority=1))
    with pytest.raises(ResourceExhausted):
        await tasks.pop()
    gateway.release(plans[0].reservation_id)
    await urgent
    assert not any(task.done() for task in tasks)
    counters = (await router.fleet()).counters
    assert (counters.queue_refusals, gateway.num_fallbacks) == (2, 0)
    for task in tasks:
        task.cancel()
    await until("they left the line", lambda: not len(router.app.router.waiting))


async def test_a_deadline_passes_while_it_waits(router: RunningRouter, gateway: RouterPeer) -> None:
    await fill(gateway)
    waiting = await begin(router, gateway, timeout_s=1.2)
    with pytest.raises(DeadlineExceeded):
        await waiting
    await until("it left the line", lambda: not len(router.app.router.waiting))
    assert gateway.num_fallbacks == 0
    assert not gateway._routers[0].is_slow
    assert len(router.app.router.reservations) == FULL


async def test_cancelled_while_it_waits(router: RunningRouter, gateway: RouterPeer) -> None:
    plans = await fill(gateway)
    waiting = await begin(router, gateway)
    waiting.cancel()
    await asyncio.wait([waiting])
    await until("it left the line", lambda: not len(router.app.router.waiting))
    assert (await router.fleet()).counters.queue_cancels == 1
    gateway.release(plans[0].reservation_id)
    await until("nobody has its place", lambda: len(router.app.router.reservations) == FULL - 1)


async def test_a_lost_stream_keeps_its_places(router: RunningRouter, gateway: RouterPeer) -> None:
    plans = await fill(gateway)
    other = make_gateway(router, gateway_id="other")
    await until("it is connected", lambda: other.connected)
    first = await begin(router, gateway, timeout_s=90)
    second = await begin(router, other, timeout_s=90)
    # The connection breaks under it; it comes back, announces, and asks again.
    before = router.app.servicer._gateways["gateway"]
    assert gateway._routers[0]._calls._task is not None
    gateway._routers[0]._calls._task.cancel()
    await asyncio.wait([gateway._routers[0]._calls._task])
    gateway._routers[0]._calls.start()
    await until(
        "it is back",
        lambda: router.app.servicer._gateways.get("gateway") not in (None, before),
    )
    (line,) = [router.app.router.waiting.line(MODEL.name)]
    assert [waiter.gateway_id for waiter in line] == ["gateway", "other"]
    await until("it asked again", lambda: line[0].unclaimed_since is None)
    assert len(router.app.router.reservations) == FULL
    gateway.release(plans[0].reservation_id)
    await first
    assert not second.done()
    gateway.release(plans[1].reservation_id)
    await second
    await other.close()
    await until("its load ends with it", lambda: len(router.app.router.reservations) == FULL - 1)


async def test_a_gateway_that_does_not_come_back_leaves_the_line(
    router: RunningRouter, gateway: RouterPeer
) -> None:
    await fill(gateway)
    gone = make_gateway(router, gateway_id="gone")
    waiting = await begin(router, gone)
    await gone.close()
    await asyncio.wait([waiting])
    assert len(router.app.router.waiting) == 1
    await until("its place is free", lambda: not len(router.app.router.waiting))


async def test_no_worker_is_left_to_wait_for(
    router: RunningRouter, worker: FakeWorker, gateway: RouterPeer, valkey: Valkey
) -> None:
    await fill(gateway)
    waiting = await begin(router, gateway)
    another = await FakeWorker(valkey.url, "another", max_sequences=1).start()
    try:
        plan = await waiting
        assert plan.worker.worker_id == "another"
        for seed in range(2):
            await route(gateway, seed)
        waiting = await begin(router, gateway)
        await worker.stop_serving()
        await another.stop_serving()
        with pytest.raises(Unavailable):
            await waiting
    finally:
        await another.close()


async def test_a_router_that_dies_is_not_waited_for(
    router: RunningRouter, gateway: RouterPeer
) -> None:
    await fill(gateway)
    waiting = await begin(router, gateway)
    await router.app.server.stop()
    # It falls back on what it knows, as without the line.
    assert (await waiting).worker.worker_id == "one"
    assert gateway.num_fallbacks == 1


async def test_another_routers_load_counts(router: RunningRouter, valkey: Valkey) -> None:
    """A router that is told of others' load waits for others' releases, too."""
    peer = await RunningRouter(valkey.url, peers=(router.app.address,)).start()
    await until("the worker answers", lambda: peer.reachable("one"))
    one, two = make_gateway(router), make_gateway(peer, gateway_id="another")
    try:
        await until("both are connected", lambda: one.connected and two.connected)
        plans = await fill(one)
        (worker,) = peer.app.fleet.workers()
        await until("it knows", lambda: peer.app.router.peers.load(worker.key).sequences == FULL)
        waiting = await begin(peer, two)
        one.release(plans[0].reservation_id)
        assert (await waiting).worker.worker_id == "one"
    finally:
        await one.close()
        await two.close()
        await peer.close()


async def test_its_answer_says_that_it_waits(router: RunningRouter) -> None:
    """The wire: `waiting` at once, the plan later, by one stream."""
    stream = router.stub.Route()
    opening = router_pb2.RouteOpen(gateway_id="raw")
    select = router_pb2.SelectWorkerRequest(
        model=MODEL.name, block_ids=prompt(40), num_tokens=40, num_sequences=1
    )
    calls = [router_pb2.RouteCall(id=number, select=select) for number in range(1, FULL + 3)]
    await stream.write(router_pb2.RouteRequest(open=opening, calls=calls))
    plans: set[int] = set()
    waiting: set[int] = set()

    async def read() -> None:
        message = await stream.read()
        assert message is not grpc.aio.EOF
        plans.update(result.id for result in message.results if result.HasField("plan"))
        waiting.update(message.waiting)

    while len(plans) + len(waiting) < len(calls):
        await read()
    assert (plans, waiting) == (set(range(1, FULL + 1)), {FULL + 1, FULL + 2})
    over = router_pb2.ReservationUpdate(id=1, event=router_pb2.ReservationUpdate.EVENT_RELEASED)
    await stream.write(router_pb2.RouteRequest(updates=[over]))
    while len(plans) == FULL:
        await read()
    assert plans == set(range(1, FULL + 2))
    stream.cancel()
