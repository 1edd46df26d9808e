"""Redis fails in every way it can; the mirror is the truth again soon after, and loses nobody.

Truth is what the block managers hold. `tests/integration/test_mesh_faults.py` does
the like with worker processes, a router's port and gateways' calls.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from headrace import registry
from headrace.registry import Event, Keys
from tests.integration.redis_parts import servers
from tests.integration.redis_parts.holders import Holder, Mirror
from tests.integration.redis_parts.proxy import CuttingProxy
from tests.integration.redis_parts.servers import SentinelForm, Server
from tests.integration.router_parts import LEASE_TTL_MS, MODEL, until

#: From when Redis is well again to when the mirror is the truth.
RECOVERY_S = 2.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        yield server


@pytest.fixture
async def workers(server: Server) -> AsyncIterator[list[Holder]]:
    workers = [await Holder(server.url, name).start() for name in ("one", "two")]
    for worker in workers:
        await worker.registered()
        worker.step()
    yield workers
    for worker in workers:
        await worker.leave()


@pytest.fixture
async def mirror(server: Server, workers: list[Holder]) -> AsyncIterator[Mirror]:
    async with Mirror(server.url) as mirror:
        await mirror.converged(*workers)
        yield mirror


async def steps(workers: list[Holder], count: int) -> None:
    for _ in range(count):
        for worker in workers:
            worker.step()
        await asyncio.sleep(0.002)


async def recovered(mirror: Mirror, workers: list[Holder], what: str) -> None:
    took_s = await mirror.converged(*workers, timeout_s=RECOVERY_S)
    print(f"recovery: {what}: {took_s * 1000:.0f} ms")
    # Nobody was taken out on the way: a new generation replaces the old in place.
    assert mirror.fleet.worker(MODEL.name, "one")


async def test_killed_and_restarted_empty(
    server: Server, workers: list[Holder], mirror: Mirror
) -> None:
    for _ in range(3):
        server.kill()
        await steps(workers, 20)
        known = set(mirror.known())
        server.start()
        assert known == {"one", "two"}
        await recovered(mirror, workers, "restarted empty")


@pytest.mark.parametrize(
    "pause_s",
    [0.5, LEASE_TTL_MS / 1000 + 1, pytest.param(30, marks=pytest.mark.slow)],
)
async def test_paused(
    server: Server, workers: list[Holder], mirror: Mirror, pause_s: float
) -> None:
    server.pause()
    for _ in range(int(pause_s * 20)):
        await steps(workers, 1)
        await asyncio.sleep(0.05)
    assert set(mirror.known()) == {"one", "two"}
    assert not mirror.left
    server.resume()
    await recovered(mirror, workers, f"paused for {pause_s:g} s")


async def test_connections_are_reset_in_the_middle_of_replies(server: Server) -> None:
    chance = random.Random(5)
    async with CuttingProxy(server.port) as proxy:
        workers = [await Holder(proxy.url, name).start() for name in ("one", "two")]
        async with Mirror(proxy.url) as mirror:
            await mirror.converged(*workers)
            for cuts in range(40):
                proxy.cut_after(chance.randrange(1, 400))
                while proxy.cuts == cuts:
                    await steps(workers, 1)
                assert set(mirror.known()) == {"one", "two"}
            await recovered(mirror, workers, "connections reset")
            assert not mirror.left
        for worker in workers:
            await worker.leave()


async def test_a_router_that_starts_late_knows_all(server: Server, workers: list[Holder]) -> None:
    for seed in range(10):
        await steps(workers, seed)
        async with Mirror(server.url) as mirror:
            # In the middle of changes.
            await steps(workers, 5)
            await recovered(mirror, workers, "router started late")


async def test_events_repeated_dropped_and_trimmed(
    server: Server, workers: list[Holder], mirror: Mirror
) -> None:
    one = workers[0]
    key = Keys(MODEL.name).events
    with server.client() as client:
        # Repeated, late and early ones: whatever stands in the stream twice counts once.
        await steps(workers, 10)
        await until("all is published", lambda: not one.publisher._has_changes())
        for _, fields in client.xrange(key):
            client.xadd(key, fields)
        await recovered(mirror, workers, "events repeated")
        assert mirror.why("one") == mirror.why("two") == "new"

        # The last ones vanish before they are read, and nothing follows them.
        async with CuttingProxy(server.port) as proxy, Mirror(proxy.url) as slow:
            await slow.converged(*workers)
            proxy.hold()
            for _ in range(3):
                one.step()
                await until("it is published", lambda: not one.publisher._has_changes())
            client.xtrim(key, maxlen=0)
            proxy.release()
            await recovered(slow, workers, "events trimmed")
            assert slow.why("one").startswith("trimmed")
            assert slow.why("two") == "new"

        # One that never was, far ahead.
        future = Event("one", one.publisher.generation, 10**6, (1, 2), (3,))
        client.xadd(key, registry.event_fields(future))
        await until("a gap was seen", lambda: mirror.why("one").startswith("gap"))
        await recovered(mirror, workers, "an event of the future")
        assert mirror.why("two") == "new"


async def test_events_of_an_unknown_generation_are_looked_up_once(
    server: Server, workers: list[Holder], mirror: Mirror
) -> None:
    one = workers[0]
    key = Keys(MODEL.name).events
    strange = one.publisher.generation + 10**9
    with server.client() as client:
        before = mirror.fleet.worker(MODEL.name, "one").resyncs
        for number in range(1, 200):
            event = Event("one", strange, number, (number,))
            client.xadd(key, registry.event_fields(event))
            nobody = Event("nobody", 7, number, (number,))
            client.xadd(key, registry.event_fields(nobody))
        client.xadd(key, {"w": "one", "g": "x", "s": "-", "t": "", "+": b"123", "-": b""})
        client.xadd(key, {b"\xff\xfe": b"\x00"})
        await steps(workers, 5)
        await recovered(mirror, workers, "malformed and unknown events")
        assert mirror.fleet.worker(MODEL.name, "one").resyncs == before
        assert mirror.fleet.worker(MODEL.name, "nobody") is None


async def test_a_restart_from_an_older_state_is_noticed_without_a_change(
    server: Server, workers: list[Holder], mirror: Mirror
) -> None:
    one = workers[0]
    keys, generation = Keys(MODEL.name), one.publisher.generation
    with server.client() as client:
        owned, sequence = keys.owned("one", generation), keys.sequence("one", generation)
        saved = {key: client.dump(key) for key in (owned, sequence)}
        one.step()
        await mirror.converged(*workers)
        for key, value in saved.items():
            client.restore(key, LEASE_TTL_MS, value, replace=True)
    await until("it began anew", lambda: one.publisher.generation > generation)
    await recovered(mirror, workers, "older data")


async def test_a_zombie_does_not_write_under_its_old_generation(
    server: Server, workers: list[Holder], mirror: Mirror
) -> None:
    """Its process stops for longer than its lease; here, its connection does."""
    keys = Keys(MODEL.name)
    async with CuttingProxy(server.port) as proxy:
        zombie = await (await Holder(proxy.url, "zombie").start()).registered()
        zombie.step()
        await mirror.converged(*workers, zombie)
        generation = zombie.publisher.generation
        with server.client() as client:
            client.delete(keys.lease("zombie"))
            zombie.step()
            await until("it began anew", lambda: zombie.publisher.generation > generation)
            await recovered(mirror, [*workers, zombie], "zombie")
            events = [registry.parse_event(fields) for _, fields in client.xrange(keys.events)]
            old = [e for e in events if e.worker_id == "zombie" and e.generation == generation]
            assert [e.sequence for e in old] == [0, 1]
            assert not client.exists(keys.owned("zombie", generation))
        await zombie.leave()


async def test_a_failover_by_sentinel(tmp_path: Path) -> None:
    with servers.sentinel(tmp_path) as form:
        assert isinstance(form, SentinelForm)
        workers = [await Holder(form.url, name).start() for name in ("one", "two")]
        async with Mirror(form.url) as mirror:
            await mirror.converged(*workers)
            form.primary.kill()
            promoted = form.replica.client()
            while promoted.info("replication")["role"] != "master":
                await steps(workers, 5)
            assert set(mirror.known()) == {"one", "two"}
            await recovered(mirror, workers, "failover")
            assert not set(mirror.left) - {"one", "two"}
            await steps(workers, 5)
            await mirror.converged(*workers)
            promoted.close()
        for worker in workers:
            await worker.leave()
        form.close()


async def test_a_node_of_a_cluster_is_away_and_only_its_partitions_wait(tmp_path: Path) -> None:
    with servers.cluster(tmp_path) as form:
        workers = [
            await Holder(form.url, f"w{number}", num_partitions=4).start() for number in range(6)
        ]
        async with Mirror(form.url) as mirror:
            await mirror.converged(*workers)
            victim = form.server_of(Keys(MODEL.name, registry.partition_of("w0", 4)).events)
            victim.pause()
            await until("it is noticed", lambda: not mirror.ownership.connected)
            await steps(workers, 20)
            assert len(mirror.known()) == 6
            victim.resume()
            await mirror.converged(*workers)
            assert not mirror.left
        for worker in workers:
            await worker.leave()
        form.close()


async def test_only_a_lease_that_ended_in_unbroken_contact_takes_a_worker_out(
    server: Server, workers: list[Holder], mirror: Mirror
) -> None:
    one, two = workers
    await until("a missing lease would count", lambda: mirror.ownership.settled)
    server.kill()
    await two.die()
    back_at = time.monotonic()
    server.start()
    await until("the first is back", lambda: one.publisher.registered.is_set())
    assert set(mirror.known()) == {"one", "two"}
    await until("the second is out", lambda: set(mirror.known()) == {"one"})
    assert time.monotonic() - back_at >= LEASE_TTL_MS / 1000
    await mirror.converged(one)
    while mirror.fleet.index.clean():
        pass
    assert len(mirror.fleet.index) == len(one.truth()["device"])


async def test_a_model_gets_more_partitions_when_its_workers_are_replaced(server: Server) -> None:
    first = await (await Holder(server.url, "first").start()).registered()
    async with Mirror(server.url) as mirror:
        # While others serve it, the list stands: a newcomer goes by what it finds.
        second = await (await Holder(server.url, "w2", num_partitions=4).start()).registered()
        second.step()
        await mirror.converged(first, second)
        assert mirror.fleet.models[MODEL.name].card.num_partitions == 1
        await first.leave()
        await second.leave()
        third = await (await Holder(server.url, "w3", num_partitions=4).start()).registered()
        fourth = await (await Holder(server.url, "w4", num_partitions=9).start()).registered()
        third.step()
        followed = mirror.ownership._partitions
        await until("all four are followed", lambda: len(followed.get(MODEL.name, ())) == 4)
        await mirror.converged(third, fourth)

        # Another in the list, whoever wrote it: all go there.
        with server.client() as client:
            card = registry.decode_model_card(client.hget(registry.MODELS_KEY, MODEL.name))
            moved = registry.encode_card(replace(card, num_partitions=7))
            client.hset(registry.MODELS_KEY, MODEL.name, moved)
            old = registry.partition_of("w3", 4)
            new = registry.partition_of("w3", 7)
            await until("it moved", lambda: client.exists(Keys(MODEL.name, new).lease("w3")))
            assert old == new or not client.exists(Keys(MODEL.name, old).lease("w3"))
        third.step()
        await mirror.converged(third, fourth)
        assert not mirror.ownership.trouble
        await third.leave()
        await fourth.leave()


async def test_a_partition_judges_its_own_workers_only(server: Server) -> None:
    names = [f"w{number}" for number in range(8)]
    workers = [
        await Holder(server.url, name, num_partitions=4, lease_ttl_ms=400).start() for name in names
    ]
    async with Mirror(server.url, lease_ttl_ms=400) as mirror:
        await mirror.converged(*workers)
        await until("a missing lease would count", lambda: mirror.ownership.settled)
        polls = mirror.ownership.polls
        await until("all were looked at since", lambda: mirror.ownership.polls > polls + 1)
        assert not mirror.left
        # Nor does it believe keys and events of workers that belong elsewhere.
        event = Event("w0", 2**62, 1, (1,))
        with server.client() as client:
            for number in range(4):
                if number != registry.partition_of("w0", 4):
                    client.xadd(Keys(MODEL.name, number).events, registry.event_fields(event))
                    client.zadd(Keys(MODEL.name, number).workers, {"w0": 2**50})
        polls = mirror.ownership.polls
        await until("all were looked at since", lambda: mirror.ownership.polls > polls + 1)
        await mirror.converged(*workers)
        assert not mirror.left
    for worker in workers:
        await worker.leave()


async def test_a_model_is_renamed_only_when_no_partition_serves_it(server: Server) -> None:
    other = replace(MODEL, revision="another")
    # Names that lie in different partitions.
    names = {registry.partition_of(f"w{n}", 4): f"w{n}" for n in range(40)}
    first = await (await Holder(server.url, names[3], num_partitions=4).start()).registered()
    second = await Holder(server.url, names[0], num_partitions=4, model=other).start()
    await second.registered()
    with server.client() as client:

        def revision() -> str:
            card = client.hget(registry.MODELS_KEY, MODEL.name)
            return registry.decode_model_card(card).revision

        assert revision() == MODEL.revision
        await first.leave()
        await until("it is renamed", lambda: revision() == "another")
    await second.leave()
