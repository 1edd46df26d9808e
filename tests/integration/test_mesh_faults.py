"""Workers', routers' and Redis' processes fail under gateways' calls: nothing is wrong for long.

Each test has a stream of `Route` calls beside it that must all be answered, and ends
when the router's mirror is, block for block, what each engine's block manager dumps.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headrace import registry
from headrace.registry import Keys
from headrace.v1 import worker_pb2
from headrace.v1.router_pb2 import ReservationUpdate
from services.router.app import App
from services.router.config import Config
from services.router.fleet import Model
from tests.integration.redis_parts.servers import Server
from tests.integration.router_parts import Gateway, RunningRouter, until
from tests.integration.worker_parts import Client, WorkerProcess, submission

MODEL = "tiny"
TTL_MS = 1200
RECOVERY_S = 2.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        yield server


@pytest.fixture
def workers(server: Server, tmp_path: Path) -> Iterator[list[WorkerProcess]]:
    flags = ("--num-blocks", "96", "--sim-step-ms", "2", "--lease-ttl-ms", str(TTL_MS))
    workers = [WorkerProcess(tmp_path, server.url, *flags) for _ in range(2)]
    try:
        for worker in workers:
            worker.wait_ready()
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


class Mesh:
    """A router, work for the workers, and calls that must go on."""

    def __init__(self, url: str, workers: list[WorkerProcess]) -> None:
        self.url = url
        self.workers = workers
        self.clients: dict[str, Client] = {}
        self.answered = 0
        self.failures: list[str] = []
        self._chance = random.Random(3)
        self._calls: asyncio.Task[None] | None = None
        self._slot = 0

    async def start_router(self) -> None:
        self.router = RunningRouter(self.url)
        self.router.app = App(Config(listen="127.0.0.1:0", redis=self.url), lease_ttl_ms=TTL_MS)
        await self.router.start()
        await until(
            "the workers answer",
            lambda: len(self._model().eligible) == len(self.workers),
        )

    def _model(self) -> Model:
        return self.router.app.fleet.models[MODEL]

    def start_calls(self) -> None:
        self._calling = True
        self._calls = asyncio.create_task(self._call())

    async def stop_calls(self) -> None:
        """All were answered, and some were made."""
        assert self._calls is not None
        await until("calls are answered", lambda: self.answered or self._calls.done())
        self._calling = False
        await self._calls
        assert not self.failures

    async def _call(self) -> None:
        gateway = await Gateway(self.router).open()
        while self._calling:
            result = await asyncio.wait_for(gateway.route(model=MODEL), 2)
            self.answered += 1
            if result.HasField("error"):
                self.failures.append(result.error.message)
            # Or nobody would have room any more.
            over = ReservationUpdate(id=result.id, event=ReservationUpdate.EVENT_RELEASED)
            await gateway.say(updates=[over])
            await asyncio.sleep(0.01)
        gateway.stream.cancel()

    async def work(self, *workers: WorkerProcess, sequences: int = 6) -> None:
        """Have engines store and evict blocks."""
        for worker in workers:
            client = self.clients.setdefault(worker.worker_id, Client(worker.address))
            for _ in range(sequences):
                self._slot += 1
                start = self._chance.randrange(3, 300)
                request = worker_pb2.GenerateSequenceRequest(
                    submission=submission(self._slot, list(range(start, start + 100)), 20)
                )
                async for _ in client.stub.GenerateSequence(request, timeout=20):
                    pass

    async def equals(self, *workers: WorkerProcess) -> bool:
        """Whether the mirror is, block for block, what the engines hold."""
        known = self.router.app.fleet.models[MODEL].workers
        if known.keys() != {worker.worker_id for worker in workers}:
            return False
        for worker in workers:
            client = self.clients.setdefault(worker.worker_id, Client(worker.address))
            packed, last = b"", worker_pb2.DumpBlocksResponse()
            async for last in client.stub.DumpBlocks(worker_pb2.DumpBlocksRequest()):
                packed += last.block_ids
            truth = set(registry.unpack_short_ids(packed))
            mirror = self.router.app.fleet.owned(known[worker.worker_id])["device"]
            if last.unpublished or mirror != truth:
                return False
        return True

    async def recovered(self, what: str, *workers: WorkerProcess) -> None:
        began = time.monotonic()
        while not await self.equals(*workers):
            assert time.monotonic() - began < RECOVERY_S, f"{what}: not within {RECOVERY_S} s"
            await asyncio.sleep(0.01)
        print(f"recovery: {what}: {(time.monotonic() - began) * 1000:.0f} ms")

    async def close(self) -> None:
        if self._calls is not None:
            self._calls.cancel()
            await asyncio.gather(self._calls, return_exceptions=True)
        for client in self.clients.values():
            await client.channel.close()
        await self.router.close()


@asynccontextmanager
async def running(server: Server, workers: list[WorkerProcess]) -> AsyncIterator[Mesh]:
    mesh = Mesh(server.url, workers)
    await mesh.start_router()
    try:
        await mesh.work(*workers)
        await mesh.recovered("started", *workers)
        mesh.start_calls()
        yield mesh
        await mesh.stop_calls()
    finally:
        await mesh.close()


async def test_redis_is_killed_and_comes_back_empty(
    server: Server, workers: list[WorkerProcess]
) -> None:
    async with running(server, workers) as mesh:
        server.kill()
        await mesh.work(*workers)
        server.start()
        await mesh.recovered("Redis restarted empty", *workers)


@pytest.mark.parametrize("pause_s", [2 * TTL_MS / 1000, pytest.param(30.0, marks=pytest.mark.slow)])
async def test_redis_is_paused(
    server: Server, workers: list[WorkerProcess], pause_s: float
) -> None:
    async with running(server, workers) as mesh:
        server.pause()
        end = time.monotonic() + pause_s
        while time.monotonic() < end:
            await mesh.work(*workers, sequences=1)
        server.resume()
        await mesh.recovered(f"Redis paused for {pause_s:g} s", *workers)


async def test_a_worker_is_killed(server: Server, workers: list[WorkerProcess]) -> None:
    dead, alive = workers
    async with running(server, workers) as mesh:
        dead.process.kill()
        model = mesh.router.app.fleet.models[MODEL]
        began = time.monotonic()
        await until(
            "it is chosen no more",
            lambda: [w.card.address for w in model.eligible] == [alive.address],
        )
        print(f"recovery: worker killed, not chosen: {(time.monotonic() - began) * 1000:.0f} ms")
        await until("it is out", lambda: dead.worker_id not in model.workers)
        print(f"recovery: worker killed, forgotten: {(time.monotonic() - began) * 1000:.0f} ms")
        await mesh.work(alive)
        await mesh.recovered("worker killed", alive)
        index = mesh.router.app.fleet.index
        await until("its blocks are cleaned", lambda: not index.clean())
        assert len(index) == len(
            mesh.router.app.fleet.owned(model.workers[alive.worker_id])["device"]
        )
        keys = Keys(MODEL)
        with server.client() as client:
            left = [key for key in client.scan_iter() if dead.worker_id.encode() in key]
            assert left == []
            assert client.zrange(keys.workers, 0, -1) == [alive.worker_id.encode()]


async def test_a_worker_is_paused_past_its_lease_and_resumed(
    server: Server, workers: list[WorkerProcess]
) -> None:
    zombie = workers[0]
    keys = Keys(MODEL)
    async with running(server, workers) as mesh:
        with server.client() as client:
            generation = int(client.get(keys.lease(zombie.worker_id)))
            # It stops with changes that it has not published.
            working = asyncio.create_task(mesh.work(zombie, sequences=10))
            await asyncio.sleep(0.05)
            os.kill(zombie.process.pid, signal.SIGSTOP)
            model = mesh.router.app.fleet.models[MODEL]
            await until("it is out", lambda: zombie.worker_id not in model.workers)
            last = client.xinfo_stream(keys.events)["last-generated-id"]
            os.kill(zombie.process.pid, signal.SIGCONT)
            await mesh_is_whole(mesh, workers)
            await working
            await mesh.recovered("worker paused and resumed", *workers)
            for _, fields in client.xrange(keys.events, min=b"(" + last):
                event = registry.parse_event(fields)
                assert event.worker_id != zombie.worker_id or event.generation > generation


async def mesh_is_whole(mesh: Mesh, workers: list[WorkerProcess]) -> None:
    model = mesh.router.app.fleet.models[MODEL]
    await until("all are members", lambda: len(model.workers) == len(workers))


async def test_a_router_that_starts_late(server: Server, workers: list[WorkerProcess]) -> None:
    async with running(server, workers) as mesh:
        await mesh.stop_calls()
        await mesh.router.close()
        await mesh.work(*workers)
        began = time.monotonic()
        await mesh.start_router()
        await mesh.recovered("router started late", *workers)
        print(f"recovery: router started late, all: {(time.monotonic() - began) * 1000:.0f} ms")
        mesh.start_calls()
        await mesh.work(*workers)
        await mesh.recovered("router started late, working", *workers)
