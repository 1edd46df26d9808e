"""Any sequence of faults ends with a mirror that is the truth, against a real server."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from headrace.registry import Keys
from tests.integration.redis_parts.holders import Holder, Mirror
from tests.integration.redis_parts.proxy import CuttingProxy
from tests.integration.redis_parts.servers import Server
from tests.integration.router_parts import MODEL

TTL_MS = 400
NUM_PARTITIONS = 2
TIERS = ("device", "host")
#: One of each partition at least.
NAMES = ("a", "b", "c")
RECOVERY_S = 2.0
#: For the dead to be found: their lease's end after an outage, and the next look.
REMOVAL_S = 2 * TTL_MS / 1000 + 1.5 + RECOVERY_S

NAME = st.sampled_from(NAMES)


class Faults(RuleBasedStateMachine):
    """Workers reach Redis through one proxy, the router through another."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.workers: dict[str, Holder] = {}
        #: Somebody ended without a word since the last check.
        self.has_dead = False
        self.is_paused = False

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.server = Server(Path(self.directory.name))
        self.run(self._begin())

    async def _begin(self) -> None:
        self.to_workers = await CuttingProxy(self.server.port).__aenter__()
        self.to_router = await CuttingProxy(self.server.port).__aenter__()
        for name in NAMES:
            await self._start(name)
        await self._new_mirror()

    async def _start(self, name: str) -> None:
        worker = Holder(
            self.to_workers.url,
            name,
            tiers=TIERS,
            num_partitions=NUM_PARTITIONS,
            lease_ttl_ms=TTL_MS,
        )
        self.workers[name] = await worker.start()

    async def _new_mirror(self) -> None:
        self.mirror = await Mirror(self.to_router.url, lease_ttl_ms=TTL_MS).__aenter__()

    @rule(name=NAME, count=st.integers(1, 100))
    def step(self, name: str, count: int) -> None:
        if name in self.workers:
            self.workers[name].step(count)

    @rule(ms=st.integers(0, 60))
    def time_passes(self, ms: int) -> None:
        self.run(asyncio.sleep(ms / 1000))

    @rule()
    def redis_loses_all(self) -> None:
        self.is_paused = False
        self.server.restart_empty()

    @precondition(lambda self: not self.is_paused)
    @rule()
    def redis_is_flushed(self) -> None:
        with self.server.client() as client:
            client.flushall()
            client.script_flush()

    @rule()
    def redis_pauses(self) -> None:
        self.is_paused = True
        self.server.pause()

    @rule()
    def redis_goes_on(self) -> None:
        self.is_paused = False
        self.server.resume()

    @rule(reply_bytes=st.integers(1, 2000), of_router=st.booleans())
    def a_connection_is_cut(self, reply_bytes: int, of_router: bool) -> None:
        (self.to_router if of_router else self.to_workers).cut_after(reply_bytes)

    @rule(name=NAME)
    def a_worker_dies(self, name: str) -> None:
        if name in self.workers:
            self.has_dead = True
            self.run(self.workers.pop(name).die())

    @rule(name=NAME)
    def a_worker_leaves(self, name: str) -> None:
        if name in self.workers:
            # Without Redis its word is lost, and its lease must end.
            self.has_dead = True
            self.run(self.workers.pop(name).leave())

    @rule(name=NAME)
    def a_worker_starts(self, name: str) -> None:
        if name not in self.workers:
            self.run(self._start(name))

    @rule()
    def the_router_starts_anew(self) -> None:
        self.run(self._restart_router())

    async def _restart_router(self) -> None:
        await self.mirror.__aexit__()
        await self._new_mirror()

    @precondition(lambda self: not self.is_paused)
    @rule(name=NAME, what=st.sampled_from(["lease", "seq", "owned", "worker"]))
    def a_key_vanishes(self, name: str, what: str) -> None:
        with self.server.client() as client:
            for partition in range(NUM_PARTITIONS):
                for key in client.keys(f"{Keys(MODEL.name, partition).tag}:{what}:{name}*"):
                    client.delete(key)

    @precondition(lambda self: not self.is_paused)
    @rule(partition=st.integers(0, NUM_PARTITIONS - 1))
    def events_are_repeated(self, partition: int) -> None:
        key = Keys(MODEL.name, partition).events
        with self.server.client() as client:
            for _, fields in client.xrange(key)[-20:]:
                client.xadd(key, fields)

    @precondition(lambda self: not self.is_paused)
    @rule(partition=st.integers(0, NUM_PARTITIONS - 1), kept=st.integers(0, 3))
    def events_are_trimmed(self, partition: int, kept: int) -> None:
        with self.server.client() as client:
            client.xtrim(Keys(MODEL.name, partition).events, maxlen=kept, approximate=False)

    @rule()
    def all_is_well_again(self) -> None:
        self.run(self._check())

    async def _check(self) -> None:
        self.is_paused = False
        self.server.resume()
        for proxy in (self.to_workers, self.to_router):
            proxy.cut_after(1 << 40)
        limit_s = REMOVAL_S if self.has_dead else RECOVERY_S
        await self.mirror.converged(*self.workers.values(), timeout_s=limit_s)
        self.has_dead = False

    def teardown(self) -> None:
        if not hasattr(self, "server"):
            self.loop.close()
            return
        try:
            self.run(self._check())
        finally:
            self.run(self._end())
            self.loop.close()
            self.server.kill()
            self.directory.cleanup()

    async def _end(self) -> None:
        await self.mirror.__aexit__()
        for worker in self.workers.values():
            await worker.leave()
        await self.to_workers.__aexit__()
        await self.to_router.__aexit__()


_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


class TestFaults(Faults.TestCase):  # type: ignore[misc, name-defined]
    """A few, at every run."""

    settings = settings(max_examples=5, stateful_step_count=15, derandomize=True, **_COMMON)


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestManyFaults(Faults.TestCase):  # type: ignore[misc, name-defined]
    """Many, when there is time."""

    settings = settings(max_examples=60, stateful_step_count=30, **_COMMON)
