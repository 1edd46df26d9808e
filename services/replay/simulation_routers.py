"""The routers of a simulation: real ones, which hear of things as late as in a mesh.

Each has a fleet, an index and reservations of its own; a request goes to the one that
its first blocks name. They decide; when they are told what is the loop's matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TYPE_CHECKING, cast

from headrace import blocks
from headrace.registry import DEVICE_TIER, Event, ModelCard, WorkerCard
from services.replay.simulation_content import NAMESPACE
from services.replay.simulation_worker import slower_tiers
from services.router.fleet import Fleet, ReportedLoad
from services.router.policies import load_policy
from services.router.reservations import LoadChanges, Reserved
from services.router.service import Router

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from services.replay.simulation import SimulationConfig
    from services.router.latency_model import Totals
    from services.router.policies import RoutingRequest
    from services.router.reservations import WorkerKey
    from services.worker.engine import EngineStats

MODEL = "replay"
#: Reservations have a limit per gateway; so many requests may be in flight 65,536 times.
NUM_GATEWAYS = 64
#: Longer than any request.
CONTEXT_LEN = 1 << 40
#: Leading blocks that say which router a request goes to.
_FAMILY_BLOCKS = 4


def gateway(number: int) -> str:
    """Whose request it is."""
    return f"gateway-{number % NUM_GATEWAYS}"


@dataclass(eq=False)
class RouterNode:
    """One router, and what it has not told the others yet."""

    number: int
    router: Router
    changes: LoadChanges | None = None
    is_telling: bool = False
    #: When it looks at those who wait although nothing happens.
    wakes_at: float = math.inf

    def told(self) -> list[tuple[WorkerKey, Reserved]]:
        """What it has reserved on the workers whose load changed, as of now."""
        self.is_telling = False
        if self.changes is None:
            return []
        found = []
        for key in sorted(self.changes.take()):
            load = self.router.reservations.load(key)
            found.append(
                (
                    key,
                    Reserved(load.prefill_tokens, load.blocks, load.sequences, load.reservations),
                )
            )
        return found


class Routers:
    """All routers, and the workers as they know them."""

    def __init__(self, config: SimulationConfig) -> None:
        self._config = config
        self._tiers = slower_tiers(config)
        policy = load_policy(config.policy)
        self._model = ModelCard(MODEL, "replay", "", CONTEXT_LEN, config.block_size)
        self._hash_vector = blocks.hash_vector(config.block_size).hex()
        self.nodes: list[RouterNode] = []
        random = Random(config.seed)
        for number in range(config.num_routers):
            fleet = Fleet()
            fleet.set_model(self._model)
            first_turn = random.randrange(1 << 16) if config.num_routers > 1 else 0
            router = Router(
                fleet, policy, first_turn=first_turn, max_waiting=config.max_waiting_requests
            )
            for gateway_number in range(NUM_GATEWAYS):
                router.reservations.open(gateway(gateway_number), object(), ())
            node = RouterNode(number, router)
            if config.num_routers > 1:
                node.changes = router.reservations.follow(lambda: None)
            self.nodes.append(node)

    def of(self, prompt_ids: Sequence[int], number: int) -> RouterNode:
        """The router that takes a request: that of its first blocks."""
        if len(self.nodes) == 1:
            return self.nodes[0]
        last = min(len(prompt_ids), _FAMILY_BLOCKS)
        key = prompt_ids[last - 1] if last else number
        return self.nodes[key % len(self.nodes)]

    def request(
        self, node: RouterNode, prompt_ids: Sequence[int], num_tokens: int, **rest: object
    ) -> RoutingRequest:
        """As the router's policy reads it."""
        return node.router.request(MODEL, prompt_ids, num_tokens, **rest)

    def join(self, worker: int, generation: int) -> None:
        """The worker is registered and its health stream answers."""
        card = WorkerCard(
            worker_id=worker_id(worker),
            generation=generation,
            address=f"worker:{worker}",
            model=self._model,
            engine="sim",
            hash_vector=self._hash_vector,
            total_blocks=self._config.num_blocks,
            max_sequences=self._config.max_sequences,
            tiers=self._tiers.names,
            tier_ms_per_block=self._tiers.ms_per_block,
        )
        for node in self.nodes:
            node.router.fleet.join(MODEL, card)
            node.router.fleet.report(MODEL, card.worker_id, ReportedLoad())

    def leave(self, worker: int) -> None:
        """The worker is gone."""
        for node in self.nodes:
            node.router.fleet.leave(MODEL, worker_id(worker))

    def report(self, worker: int, stats: EngineStats, *, draining: bool) -> None:
        """The worker's health stream says this."""
        load = ReportedLoad(
            active_sequences=stats.active_sequences,
            queued_sequences=stats.queued_sequences,
            queued_prefill_tokens=stats.queued_prefill_tokens,
            used_blocks=stats.used_blocks,
            total_blocks=stats.total_blocks,
            draining=draining,
            # It has all the fields of Totals, under their names.
            totals=cast("Totals", stats),
        )
        for node in self.nodes:
            node.router.fleet.report(MODEL, worker_id(worker), load)

    def changed(
        self,
        worker: int,
        generation: int,
        stored: Iterable[int],
        removed: Iterable[int],
        tier: str = DEVICE_TIER,
    ) -> None:
        """An event of the worker, in order."""
        for node in self.nodes:
            fleet = node.router.fleet
            member = fleet.worker(MODEL, worker_id(worker))
            if member is not None and member.key.generation == generation:
                event = Event(
                    member.key.worker_id,
                    generation,
                    member.sequence + 1,
                    tuple(stored),
                    tuple(removed),
                    tier,
                )
                fleet.apply(member, event)


@cache
def worker_id(worker: int) -> str:
    """Its name: the names' order is the numbers'."""
    return f"w{worker:06d}"


__all__ = ["MODEL", "NAMESPACE", "RouterNode", "Routers", "gateway", "worker_id"]
