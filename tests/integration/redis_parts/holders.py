"""Workers without an engine, and a router without a port: what keeps Redis and mirrors it.

A `Holder` is the real publisher over real block managers, which are the truth; a
`Mirror` is the real fleet kept by the real ownership.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from msgspec.structs import replace

from headrace import blocks
from headrace.registry import DEVICE_TIER, WorkerCard
from headrace.service import cancel_and_wait
from services.router.fleet import Fleet
from services.router.ownership import Ownership
from services.worker.kv.block_manager import BlockManager
from services.worker.publisher import Publisher
from tests.integration.router_parts import BLOCK_SIZE, LEASE_TTL_MS, MODEL, until

NUM_BLOCKS = 256


class Holder:
    """One worker: `start`, `step` as often as wanted, `leave` or `die`."""

    def __init__(
        self,
        url: str,
        worker_id: str,
        *,
        tiers: tuple[str, ...] = (DEVICE_TIER,),
        num_partitions: int = 1,
        lease_ttl_ms: int = LEASE_TTL_MS,
        **card: Any,
    ) -> None:
        self.worker_id = worker_id
        self._managers = {tier: BlockManager(NUM_BLOCKS) for tier in tiers}
        self._chance = random.Random(worker_id)
        model = replace(card.pop("model", MODEL), num_partitions=num_partitions)
        fields = {"hash_vector": blocks.hash_vector(BLOCK_SIZE).hex(), **card}

        def make_card(generation: int) -> WorkerCard:
            # Nobody serves there: membership and blocks don't depend on it.
            return WorkerCard(
                worker_id,
                generation,
                "127.0.0.1:9",
                model,
                "sim",
                total_blocks=NUM_BLOCKS,
                tiers=tiers,
                lease_ttl_ms=lease_ttl_ms,
                **fields,
            )

        self.publisher = Publisher(url, make_card)

    async def start(self) -> Holder:
        self.publisher.start()
        return self

    async def registered(self) -> Holder:
        await asyncio.wait_for(self.publisher.registered.wait(), 15)
        return self

    def step(self, count: int = 20) -> None:
        """As an engine's step does in every tier: some blocks come, the oldest go."""
        for tier, manager in self._managers.items():
            taken = manager.allocate(count)
            for block in taken:
                manager.register([block], [self._chance.randbytes(16)])
            manager.release(taken)
            stored, removed = manager.take_changes()
            self.publisher.on_change(stored, removed, tier)

    def truth(self) -> dict[str, set[int]]:
        """What the block managers say, by tier."""
        return {tier: set(manager.owned()) for tier, manager in self._managers.items()}

    async def leave(self) -> None:
        await self.publisher.leave()

    async def die(self) -> None:
        """As if killed: no departure, its lease must end."""
        await cancel_and_wait(self.publisher._task)
        self.publisher._task = None
        await self.publisher.leave()


class Mirror:
    """What a router would know. Use as an asynchronous context."""

    def __init__(self, url: str, *, lease_ttl_ms: int = LEASE_TTL_MS) -> None:
        self.fleet = Fleet()
        self.ownership = Ownership(url, self.fleet, lease_ttl_ms=lease_ttl_ms)
        self.left: list[str] = []
        self.fleet.on_leave.append(lambda _, worker: self.left.append(worker.key.worker_id))

    async def __aenter__(self) -> Mirror:
        self.ownership.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.ownership.close()

    def known(self) -> dict[str, dict[str, set[int]]]:
        """Blocks by worker and tier."""
        model = self.fleet.models.get(MODEL.name)
        return {
            worker_id: self.fleet.owned(worker)
            for worker_id, worker in (model.workers if model else {}).items()
        }

    def equals(self, *holders: Holder) -> bool:
        """Whether it knows just these holders, with just what they hold."""
        return self.known() == {holder.worker_id: holder.truth() for holder in holders}

    async def converged(self, *holders: Holder, timeout_s: float = 15) -> float:
        """Wait until it `equals`; how long that took, in seconds."""
        began = time.monotonic()
        await until("the mirror equals the truth", lambda: self.equals(*holders), timeout_s)
        return time.monotonic() - began

    def why(self, worker_id: str) -> str:
        """The cause of a worker's last reload."""
        worker = self.fleet.worker(MODEL.name, worker_id)
        return worker.last_resync_cause if worker else ""
