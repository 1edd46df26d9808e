"""Tells Redis what this worker is and which blocks it holds; see headrace.registry.

One task registers, renews the lease and publishes changes, one command at a time.
Changes gather as a net set while a command is under way or Redis is away, so that
memory is bounded by the engine's blocks and nothing else ever waits for Redis.
After an outage it goes on where it was if its lease still stands, and otherwise
registers anew, as a new generation with all its blocks.

It knows neither engine nor streams.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from typing import TYPE_CHECKING, NamedTuple

from redis.exceptions import RedisError

from headrace import redis_servers, registry
from headrace.redis_outage import Outage, explain
from headrace.service import cancel_and_wait
from services.worker import publisher_scripts as scripts
from services.worker.model_listing import ModelListing
from services.worker.ownership import OwnedBlocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from headrace.registry import Keys, WorkerCard
    from services.worker.ownership import Change

#: Ids in one event at most.
MAX_EVENT_IDS = 1024
#: Changes of this long go out together: a script costs the worker as much as 50 ids in it.
#: (`benchmarks/ownership.py`: 10,000 changes a second then take under 5 % of one core.)
_PUBLISH_INTERVAL_S = 0.02
#: After a fault of ours.
_RETRY_S = 1.0
_LEAVE_TIMEOUT_S = 2.5

log = logging.getLogger("headrace.worker")


class Published(NamedTuple):
    """What readers know at a sequence, as short ids, and how many changes they don't know."""

    blocks: list[int]
    sequence: int
    unpublished: int


class Publisher:
    """One worker's part of Redis. `card(generation)` makes its card.

    The card also says what stays from generation to generation: the worker's id, its
    tiers, its lease's TTL, its model, and how many partitions it would give that.
    `start` inside the loop; `on_change` hears the engine's changes from the first
    step on; `registered` is set while the present generation is in Redis.
    Raises StartupError for a bad URL.
    """

    def __init__(self, url: str, card: Callable[[int], WorkerCard]) -> None:
        self.generation = time.time_ns()
        self.registered = asyncio.Event()
        self._card = card
        present = card(self.generation)
        self._worker_id = present.worker_id
        self._ttl_ms = present.lease_ttl_ms
        self._tiers = present.tiers
        self._servers = redis_servers.servers(url)
        self._listing = ModelListing(self._servers, self._worker_id)
        self._outage = Outage(log, registry.redact(url))
        self._keys = self._keys_of(present.model.num_partitions)
        self._owned = {tier: OwnedBlocks() for tier in self._tiers}
        self._sequence = 0
        self._in_flight: tuple[str, Change] | None = None
        self._renew_at = 0.0
        self._woken = asyncio.Event()
        self._leaving = False
        self._task: asyncio.Task[None] | None = None

    @property
    def trouble(self) -> str:
        """What is wrong with Redis now, and its cure; empty while all is well."""
        return self._outage.cause

    def start(self) -> None:
        """Register, and stay registered."""
        self._task = asyncio.create_task(self._run(), name="publisher")

    async def leave(self) -> None:
        """Take this worker out of Redis now, as far as Redis answers. More than once is fine."""
        self._leaving = True
        self._woken.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_LEAVE_TIMEOUT_S)
            await cancel_and_wait(self._task)
            self._task = None
        await self._servers.aclose()

    def on_change(
        self, stored: Iterable[int], removed: Iterable[int], tier: str = registry.DEVICE_TIER
    ) -> None:
        """What a step changed in a tier, in short ids. Raises KeyError for an unknown tier."""
        self._owned[tier].apply(stored, removed)
        self._woken.set()

    def published_of(self, owned: Iterable[int], tier: str = registry.DEVICE_TIER) -> Published:
        """Of all blocks that the engine holds in a tier, those that readers know."""
        blocks = self._owned[tier]
        unpublished = blocks.num_changes
        if self._in_flight is not None:
            change = self._in_flight[1]
            unpublished += len(change.stored) + len(change.removed)
        return Published(blocks.published_of(owned), self._sequence, unpublished)

    async def _run(self) -> None:
        while not self._leaving:
            try:
                if not self.registered.is_set():
                    await self._do_register()
                else:
                    await self._do_next()
            except (RedisError, OSError) as error:
                self._servers.lost()
                # The first thing to learn from a Redis that returns is whether we're in it.
                self._renew_at = 0.0
                await self._wait(self._outage.failed(error))
            except Exception:
                # A fault of ours must not end publishing for good: begin anew with all blocks.
                log.exception("publishing failed")
                self.registered.clear()
                await self._wait(_RETRY_S)
            else:
                # A full Redis renews leases all the same: only what it refused shows the end.
                if self._in_flight is None:
                    self._outage.over()
        try:
            await self._do_leave()
        except (RedisError, OSError) as error:
            log.warning("could not leave Redis: %s", explain(error))

    async def _wait(self, seconds: float) -> None:
        """Until it is time, or to leave."""
        end = time.monotonic() + seconds
        while not self._leaving and (left := end - time.monotonic()) > 0:
            self._woken.clear()
            try:
                async with asyncio.timeout(left):
                    await self._woken.wait()
            except TimeoutError:
                return

    async def _do_next(self) -> None:
        """Wait for a change or the lease's renewal, and send it."""
        if not self._has_changes():
            self._woken.clear()
            try:
                async with asyncio.timeout(max(0.0, self._renew_at - time.monotonic())):
                    await self._woken.wait()
            except TimeoutError:
                pass
        if self._leaving:
            return
        if time.monotonic() >= self._renew_at:
            await self._do_renew()
        elif self._has_changes():
            await self._do_publish()
            await asyncio.sleep(_PUBLISH_INTERVAL_S)

    def _has_changes(self) -> bool:
        return self._in_flight is not None or any(o.has_changes for o in self._owned.values())

    async def _do_register(self) -> None:
        former = self.generation
        self.generation = max(time.time_ns(), former + 1)
        card = self._card(self.generation)
        self._keys = self._keys_of(await self._listing.register(card.model))
        # Only now, with nothing awaited since: what comes later is a change of this.
        owned = [blocks.snapshot() for blocks in self._owned.values()]
        self._sequence = 0
        self._in_flight = None
        event = registry.Event(self._worker_id, self.generation, 0)
        held = await scripts.REGISTER.run(
            await self._servers.of(self._keys.events),
            keys=[
                *self._own_keys(),
                self._keys.sequence(self._worker_id, former),
                *self._owned_keys(self.generation),
                *self._owned_keys(former),
            ],
            args=[
                self._worker_id,
                self.generation,
                self._ttl_ms,
                registry.encode_card(card),
                len(owned),
                *owned,
                *_flat(event),
            ],
        )
        if held:
            log.warning(
                "generation %d of %s is in Redis already; registering after it",
                int(held),
                self._worker_id,
            )
            self.generation = int(held)
            return
        self._schedule_renewal()
        self.registered.set()
        log.info(
            "registered as %s, generation %d, %d blocks, partition %s",
            self._worker_id,
            self.generation,
            sum(map(len, owned)) // 8,
            self._keys.tag,
        )

    async def _do_renew(self) -> None:
        card = self._card(self.generation)
        known = self._sequence - (self._in_flight is not None)
        renewed = await scripts.RENEW.run(
            await self._servers.of(self._keys.events),
            keys=[*self._own_keys(), *self._owned_keys(self.generation)],
            args=[
                self._worker_id,
                self.generation,
                self._ttl_ms,
                known,
                self._sequence,
                registry.encode_card(card),
            ],
        )
        if not renewed:
            self._lose()
            return
        self._schedule_renewal()
        keys = self._keys_of(await self._listing.renew(card.model))
        if keys.tag != self._keys.tag:
            log.warning("model %s has other partitions now: moving to %s", keys.model, keys.tag)
            await self._do_leave()

    async def _do_publish(self) -> None:
        if self._in_flight is None:
            tier = next(tier for tier, owned in self._owned.items() if owned.has_changes)
            self._in_flight = tier, self._owned[tier].take(MAX_EVENT_IDS)
            self._sequence += 1
        tier, change = self._in_flight
        event = registry.Event(
            self._worker_id, self.generation, self._sequence, change.stored, change.removed, tier
        )
        published = await scripts.PUBLISH.run(
            await self._servers.of(self._keys.events),
            keys=[
                self._keys.lease(self._worker_id),
                self._keys.owned(self._worker_id, self.generation, tier),
                self._keys.sequence(self._worker_id, self.generation),
                self._keys.events,
            ],
            args=[
                self.generation,
                self._sequence,
                self._ttl_ms,
                len(change.writes),
                *(part for write in change.writes for part in write),
                *_flat(event),
            ],
        )
        if published:
            self._in_flight = None
        else:
            self._lose()

    async def _do_leave(self) -> None:
        if not self.registered.is_set():
            return
        self.registered.clear()
        event = registry.Event(self._worker_id, self.generation, 0, tier=registry.GONE_TIER)
        await scripts.LEAVE.run(
            await self._servers.of(self._keys.events),
            keys=[*self._own_keys(), *self._owned_keys(self.generation)],
            args=[self._worker_id, self.generation, self._ttl_ms, *_flat(event)],
        )

    def _lose(self) -> None:
        log.warning(
            "the lease of %s, generation %d, is lost (Redis was away or lost data, or another "
            "worker has this id): registering anew",
            self._worker_id,
            self.generation,
        )
        self.registered.clear()

    def _schedule_renewal(self) -> None:
        self._renew_at = time.monotonic() + self._ttl_ms / registry.LEASE_RENEWALS / 1000

    def _keys_of(self, num_partitions: int) -> Keys:
        partition = registry.partition_of(self._worker_id, num_partitions)
        return registry.Keys(self._card(self.generation).model.name, partition)

    def _own_keys(self) -> list[str]:
        """Lease, card, workers, events, seq."""
        keys, worker_id = self._keys, self._worker_id
        return [
            keys.lease(worker_id),
            keys.worker(worker_id),
            keys.workers,
            keys.events,
            keys.sequence(worker_id, self.generation),
        ]

    def _owned_keys(self, generation: int) -> list[str]:
        """A generation's owned blocks, by tier."""
        return [self._keys.owned(self._worker_id, generation, tier) for tier in self._tiers]


def _flat(event: registry.Event) -> Iterator[bytes | str | int]:
    return itertools.chain.from_iterable(registry.event_fields(event).items())
