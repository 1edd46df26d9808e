"""The real publisher of the worker and the router's mirror, over a real Valkey."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest

from headrace import blocks
from headrace.registry import WorkerCard
from services.worker.publisher import Publisher
from tests.integration.router_parts import (
    BLOCK_SIZE,
    MODEL,
    RunningRouter,
    Valkey,
    until,
)


@pytest.fixture
async def publishers(valkey: Valkey) -> AsyncIterator[list[Publisher]]:
    def card(worker_id: str, generation: int) -> WorkerCard:
        vector = blocks.hash_vector(BLOCK_SIZE).hex()
        # Nobody serves there: membership and blocks don't depend on it.
        return WorkerCard(worker_id, generation, "127.0.0.1:9", MODEL, "sim", vector, 1000)

    publishers = [
        Publisher(valkey.url, lambda g, name=name: card(name, g)) for name in ("one", "two")
    ]
    for publisher in publishers:
        publisher.start()
        await publisher.registered.wait()
    yield publishers
    for publisher in publishers:
        await publisher.leave()


async def test_random_steps_a_restart_and_a_departure(
    valkey: Valkey, publishers: list[Publisher]
) -> None:
    router = await RunningRouter(valkey.url).start()
    truth: dict[str, set[int]] = {"one": set(), "two": set()}
    chance = random.Random(7)

    async def steps(count: int) -> None:
        for _ in range(count):
            for name, publisher in zip(truth, publishers, strict=True):
                owned = truth[name]
                stored = {chance.getrandbits(12) + 1 for _ in range(40)} - owned
                removed = set(chance.sample(sorted(owned), min(len(owned), 30)))
                publisher.on_change(stored, removed)
                owned |= stored
                owned -= removed
        for name, owned in truth.items():
            await until(f"{name} is mirrored", lambda n=name, o=owned: router.owned(n) == o)

    try:
        await steps(50)
        assert router.resyncs("one")[1] == "new"
        valkey.restart_empty()
        await steps(50)
        await until("a new generation", lambda: router.resyncs("two")[1] == "new generation")
        await steps(10)
        await publishers[0].leave()
        await until("it left", lambda: router.app.fleet.worker(MODEL.name, "one") is None)
    finally:
        await router.close()
