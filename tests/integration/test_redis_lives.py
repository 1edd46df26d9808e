"""Workers come and go by the thousand; what they leave in Redis and in a router is nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace import registry
from tests.integration.redis_parts.holders import Holder, Mirror
from tests.integration.redis_parts.servers import Server
from tests.integration.router_parts import MODEL, until

TTL_MS = 400
LIVES = 1000
AT_ONCE = 25


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        yield server


async def test_a_thousand_lives_leave_no_key_and_no_memory(server: Server) -> None:
    client = server.client()

    async def live(number: int) -> None:
        worker = await Holder(server.url, f"w{number}", lease_ttl_ms=TTL_MS).start()
        await worker.registered()
        worker.step(100)
        await until("it published", lambda: not worker.publisher._has_changes())
        await (worker.leave() if number % 2 else worker.die())

    async def lives(first: int, count: int) -> None:
        for start in range(first, first + count, AT_ONCE):
            await asyncio.gather(*map(live, range(start, start + AT_ONCE)))

    def is_empty() -> bool:
        return client.keys() == [registry.MODELS_KEY.encode()]

    def used_memory() -> int:
        client.execute_command("MEMORY PURGE")
        return int(client.info("memory")["used_memory"])

    async with Mirror(server.url, lease_ttl_ms=TTL_MS) as mirror:
        # What scripts, connections and tables take is taken by the first lives.
        await lives(0, 2 * AT_ONCE)
        await until("all keys are gone", is_empty)
        await until("the router knows nobody", lambda: not mirror.known())
        before = used_memory()
        await lives(2 * AT_ONCE, LIVES)
        await until("all keys are gone", is_empty)
        await until("the router knows nobody", lambda: not mirror.known())
        grown = used_memory() - before
        while mirror.fleet.index.clean():
            pass
        assert len(mirror.fleet.index) == 0
        # Most came and went between two looks.
        assert mirror.left
    # A worker's keys take 2 KB; the lives published 800 bytes of ids each.
    assert grown < 200_000, f"{LIVES} lives left {grown} bytes"
    assert list(client.hkeys(registry.MODELS_KEY)) == [MODEL.name.encode()]
    client.close()


async def test_every_key_of_a_worker_expires_with_its_lease(server: Server) -> None:
    worker = await (await Holder(server.url, "w", tiers=("device", "host")).start()).registered()
    worker.step()
    with server.client() as client:
        await until("it published", lambda: not worker.publisher._has_changes())
        keys = set(client.keys()) - {registry.MODELS_KEY.encode()}
        assert len(keys) == 7, keys
        assert all(0 < client.pttl(key) <= 2000 for key in keys)
        await worker.die()


async def test_old_events_are_dropped(server: Server) -> None:
    keys = registry.Keys(MODEL.name)
    old = registry.event_fields(registry.Event("w", 1, 1, tuple(range(1, 101))))
    with server.client() as client:
        seconds, _ = client.time()
        for number in range(500):
            client.xadd(keys.events, old, id=f"{(seconds - 60) * 1000}-{number + 1}")
        worker = await (await Holder(server.url, "w").start()).registered()
        worker.step()
        await until("it published", lambda: not worker.publisher._has_changes())
        # Whole nodes of the stream are dropped: a few of the old may share the first.
        assert client.xlen(keys.events) < 20
        await worker.leave()
