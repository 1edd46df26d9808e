"""The router's mirror of Redis: a real Valkey, workers that write as the registry says."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from headrace import registry
from services.router.fleet import Fleet
from services.router.ownership import Ownership
from services.router.reservations import WorkerKey
from tests.integration.router_parts import (
    MODEL,
    FakeWorker,
    Proxy,
    RunningRouter,
    Valkey,
    until,
)


@pytest.fixture
async def workers(valkey: Valkey) -> AsyncIterator[list[FakeWorker]]:
    """Two workers, one holding blocks 1–50 and the other 101–150."""
    workers = [FakeWorker(valkey.url, "one"), FakeWorker(valkey.url, "two")]
    for number, worker in enumerate(workers):
        worker.publisher.owned = [*range(100 * number + 1, 100 * number + 51)]
        await worker.start()
    yield workers
    for worker in workers:
        await worker.close()


@pytest.fixture
async def router(valkey: Valkey, workers: list[FakeWorker]) -> AsyncIterator[RunningRouter]:
    router = await RunningRouter(valkey.url).start()
    await until("both workers answer", lambda: router.reachable("one", "two"))
    yield router
    await router.close()


async def mirrored(router: RunningRouter, *workers: FakeWorker) -> None:
    """Wait until the mirror equals what the workers hold."""
    for worker in workers:
        publisher = worker.publisher
        await until(
            f"the blocks of {publisher.card.worker_id} are known",
            lambda p=publisher: router.owned(p.card.worker_id) == set(p.owned),
        )


async def test_it_loads_what_is_there_and_follows_what_comes(
    router: RunningRouter, workers: list[FakeWorker]
) -> None:
    one, two = workers
    await mirrored(router, one, two)
    await one.publisher.publish(stored=[7001, 7002], removed=[1, 2, 3])
    await two.publisher.publish(stored=[7001])
    await mirrored(router, one, two)
    assert router.resyncs("one") == (1, "new")
    fleet = await router.fleet()
    assert fleet.redis_connected
    states = fleet.models[0].workers
    assert [(s.worker.worker_id, s.owned_blocks, s.last_sequence) for s in states] == [
        ("one", 49, 1),
        ("two", 51, 1),
    ]


async def test_repeated_events_are_ignored(
    router: RunningRouter, workers: list[FakeWorker]
) -> None:
    one = workers[0]
    await one.publisher.publish(stored=[7001], times=3)
    await one.publisher.publish(removed=[7001], times=2)
    await one.publisher.publish(stored=[7003])
    await mirrored(router, one)
    assert router.resyncs("one") == (1, "new")


async def test_a_gap_reloads_that_worker_only(
    router: RunningRouter, workers: list[FakeWorker]
) -> None:
    one, two = workers
    await one.publisher.publish(stored=[7001], say=False)
    await one.publisher.publish(stored=[7002])
    await two.publisher.publish(stored=[7001])
    await mirrored(router, one, two)
    assert router.resyncs("one") == (2, "gap: event 2 after 0")
    assert router.resyncs("two") == (1, "new")


async def test_events_that_were_trimmed_away_are_noticed(
    router: RunningRouter, workers: list[FakeWorker]
) -> None:
    one, two = workers
    await one.publisher.publish(stored=[7001], removed=[1], say=False)
    await mirrored(router, one, two)
    assert router.resyncs("one") == (2, "trimmed: event 1 is past, 0 was seen")
    assert router.resyncs("two") == (1, "new")


async def test_a_malformed_event_costs_a_reload(
    router: RunningRouter, workers: list[FakeWorker]
) -> None:
    one = workers[0]
    await one.publisher.redis.xadd(one.publisher.keys.events, {"w": "one", "+": b"123"})
    await one.publisher.publish(stored=[7001])
    await mirrored(router, one)
    assert router.reachable("one", "two")


async def test_a_new_generation_replaces_the_old(
    router: RunningRouter, workers: list[FakeWorker], valkey: Valkey
) -> None:
    old, two = workers
    await old.close()
    new = FakeWorker(valkey.url, "one", generation=2)
    new.publisher.owned = [9001, 9002]
    await new.start()
    workers.append(new)
    await mirrored(router, new, two)
    await until("it is chosen", lambda: router.reachable("one", "two"))
    assert (await router.fleet()).models[0].workers[0].worker.generation == 2
    # What a zombie of the first generation still says counts for nothing.
    zombie = registry.Event("one", 1, 1, stored=(1, 2, 3))
    await two.publisher.redis.xadd(two.publisher.keys.events, registry.event_fields(zombie))
    await two.publisher.publish(stored=[7001])
    await mirrored(router, new, two)


async def test_a_card_counts_only_while_its_generation_holds_the_lease(
    router: RunningRouter, valkey: Valkey
) -> None:
    third = FakeWorker(valkey.url, "three", generation=2)
    redis, keys = third.publisher.redis, third.publisher.keys
    for lease in (None, 1):
        if lease is not None:
            await redis.set(keys.lease("three"), lease)
        await redis.set(keys.worker("three"), registry.encode_card(third.publisher.card))
        await redis.zadd(keys.workers, {"three": 1})
        await redis.xadd(keys.events, registry.event_fields(registry.Event("three", 2, 0)))
        await until("the members were polled", router.polled_again())
        assert router.app.fleet.worker(MODEL.name, "three") is None
    await redis.set(keys.lease("three"), 2)
    await until("it is a member", lambda: router.app.fleet.worker(MODEL.name, "three"))
    await third.close()


async def test_a_clean_departure_takes_effect_at_once(
    router: RunningRouter, workers: list[FakeWorker]
) -> None:
    one, two = workers
    await one.stop_renewing()
    await one.publisher.depart()
    await until("it is gone", lambda: router.app.fleet.worker(MODEL.name, "one") is None)
    await two.publisher.publish(stored=[1, 2, 3])
    await mirrored(router, two)
    await until("its blocks are cleaned", lambda: len(router.app.fleet.index) == 53)


async def test_closing_ends_it_whatever_it_is_doing(
    valkey: Valkey, workers: list[FakeWorker]
) -> None:
    for turns in range(0, 80, 2):
        ownership = Ownership(valkey.url, Fleet())
        ownership.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        closing = asyncio.ensure_future(ownership.close())
        done, _ = await asyncio.wait({closing}, timeout=10)
        assert done, f"it did not end when closed after {turns} turns of the loop"
        closing.result()


async def test_a_paused_redis_removes_nobody(
    router: RunningRouter, workers: list[FakeWorker], valkey: Valkey
) -> None:
    pid = valkey.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        await until("the outage is noticed", lambda: not router.app.ownership.connected)
        assert (await router.select()).legs[0].worker.worker_id in ("one", "two")
        assert not (await router.fleet()).redis_connected
    finally:
        os.kill(pid, signal.SIGCONT)
    await until("Redis is back", lambda: router.app.ownership.connected)
    assert router.reachable("one", "two")
    assert router.resyncs("one") == (1, "new")


async def test_lost_data_removes_nobody_until_all_had_the_time_to_come_back(
    router: RunningRouter, workers: list[FakeWorker], valkey: Valkey
) -> None:
    one, two = workers
    fleet, ownership = router.app.fleet, router.app.ownership
    await mirrored(router, one, two)
    left: list[WorkerKey] = []
    fleet.on_leave.append(lambda model, worker: left.append(worker.key))
    for lose in (one.publisher.redis.flushall, valkey.restart_empty):
        await until("a missing lease would count", lambda: ownership.settled)
        await one.stop_renewing()
        await two.stop_renewing()
        done = lose()
        if done is not None:
            await done
        await until("the loss is noticed", lambda: left or not ownership.settled)
        assert not left
        assert router.reachable("one", "two")
        await mirrored(router, one, two)
        for worker in workers:
            await worker.reregister()
            worker.renew()
        await until("both came back", lambda: len(left) == 2)
        await until("both are mirrored anew", lambda: router.resyncs("two")[0] > 1)
        await mirrored(router, one, two)
        assert router.reachable("one", "two")
        left.clear()

    await until("a missing lease would count", lambda: ownership.settled)
    await two.stop_renewing()
    await until("it is gone", lambda: left)
    assert left == [WorkerKey("two", 3)]
    assert router.reachable("one")


async def test_data_lost_in_the_middle_of_a_poll_removes_nobody(
    valkey: Valkey, workers: list[FakeWorker]
) -> None:
    proxy, fleet = Proxy(valkey), Fleet()
    ownership = Ownership(await proxy.start(), fleet, lease_ttl_ms=200)
    left: list[str] = []
    fleet.on_leave.append(lambda model, worker: left.append(worker.key.worker_id))
    ownership.start()
    try:
        await until("both are members", lambda: fleet.worker(MODEL.name, "two"))
        await until("a missing lease would count", lambda: ownership.settled)
        for worker in workers:
            await worker.stop_renewing()
        # The members have been listed by then; their leases are what is read next.
        proxy.once_before(b":lease:", workers[0].publisher.redis.flushall)
        await until("the data was lost there", lambda: not proxy.is_armed)
        await until("that poll is over", lambda: left or not ownership.settled)
        assert not left
    finally:
        await ownership.close()
        await proxy.close()


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("tokenizer digest", {"model": replace(MODEL, tokenizer_digest="another")}),
        ("model revision", {"model": replace(MODEL, revision="another")}),
        ("block size", {"model": replace(MODEL, block_size=32)}),
        ("block ids", {"hash_vector": "00"}),
    ],
)
async def test_a_worker_that_disagrees_is_refused(
    router: RunningRouter,
    valkey: Valkey,
    caplog: pytest.LogCaptureFixture,
    what: str,
    fields: dict[str, Any],
) -> None:
    stranger = FakeWorker(valkey.url, "stranger", **fields)
    with caplog.at_level(logging.ERROR, logger="headrace.router"):
        # Like a real one, it writes its own idea of the model into the registry.
        await stranger.start()
        await until("it is refused", lambda: router.app.fleet.models[MODEL.name].refused)
        await stranger.publisher.publish(stored=[1, 2, 3])
        refused = router.app.fleet.models[MODEL.name].refused
        await until("it is said", lambda: "stranger" in caplog.text)
        if "model" in fields:
            # Its card stands in the registry now: it must not turn the others out.
            await until("its card was read", lambda: "was registered anew" in caplog.text)
            await until("the workers were polled since", router.polled_again())
    assert router.reachable("one", "two")
    told = (await router.fleet()).models[0].refused
    assert [r.worker.worker_id for r in told] == ["stranger"]
    assert what in told[0].reason
    assert caplog.text.count("is refused") == 1
    await stranger.stop_renewing()
    await stranger.publisher.depart()
    await until("it is forgotten", lambda: not refused)
    await stranger.close()
