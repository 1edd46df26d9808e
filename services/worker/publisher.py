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
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from headrace import registry
from headrace.service import cancel_and_wait
from services.worker import publisher_scripts as scripts
from services.worker.ownership import OwnedBlocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from headrace.registry import Keys, ModelCard, WorkerCard
    from services.worker.ownership import Change

#: Ids in one event at most.
MAX_EVENT_IDS = 1024
#: Changes of this long go out together.
_PUBLISH_INTERVAL_S = 0.01
_RETRY_MIN_S = 0.05
_RETRY_MAX_S = 1.0
_LEAVE_TIMEOUT_S = 2.5

log = logging.getLogger("headrace.worker")


class Publisher:
    """One worker's part of Redis. `card(generation)` makes its card.

    `start` inside the loop; `on_change` hears the engine's changes from the first
    step on; `registered` is set while the present generation is in Redis.
    """

    def __init__(
        self, url: str, worker_id: str, keys: Keys, card: Callable[[int], WorkerCard]
    ) -> None:
        self.generation = time.time_ns()
        self.registered = asyncio.Event()
        self._worker_id = worker_id
        self._keys = keys
        self._card = card
        self._redis = registry.connect(url)
        self._register = self._redis.register_script(scripts.REGISTER)
        self._renew = self._redis.register_script(scripts.RENEW)
        self._publish = self._redis.register_script(scripts.PUBLISH)
        self._leave = self._redis.register_script(scripts.LEAVE)
        self._url = url
        self._owned = OwnedBlocks()
        self._sequence = 0
        self._in_flight: Change | None = None
        self._renew_at = 0.0
        self._woken = asyncio.Event()
        self._leaving = False
        self._task: asyncio.Task[None] | None = None

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
        await self._redis.aclose()

    def on_change(self, stored: Iterable[int], removed: Iterable[int]) -> None:
        """What a step changed, in short ids."""
        self._owned.apply(stored, removed)
        self._woken.set()

    def published_of(self, owned: Iterable[int]) -> tuple[list[int], int]:
        """Of the engine's blocks, those that readers know at the sequence returned with them."""
        return self._owned.published_of(owned), self._sequence

    async def _run(self) -> None:
        delay = 0.0
        while not self._leaving:
            try:
                if not self.registered.is_set():
                    await self._do_register()
                else:
                    await self._do_next()
            except (RedisError, OSError) as error:
                if not delay:
                    log.warning("Redis at %s: %s; going on without it", self._url, error)
                delay = min(max(2 * delay, _RETRY_MIN_S), _RETRY_MAX_S)
                # The first thing to learn from a Redis that returns is whether we're in it.
                self._renew_at = 0.0
                await asyncio.sleep(delay)
            except Exception:
                # A fault of ours must not end publishing for good: begin anew with all blocks.
                log.exception("publishing failed")
                self.registered.clear()
                await asyncio.sleep(_RETRY_MAX_S)
            else:
                if delay:
                    log.info("Redis at %s answers again", self._url)
                delay = 0.0
        try:
            await self._do_leave()
        except (RedisError, OSError) as error:
            log.warning("could not leave Redis at %s: %s", self._url, error)

    async def _do_next(self) -> None:
        """Wait for a change or the lease's renewal, and send it."""
        if self._in_flight is None and not self._owned.has_changes:
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
        elif self._in_flight is not None or self._owned.has_changes:
            await self._do_publish()
            await asyncio.sleep(_PUBLISH_INTERVAL_S)

    async def _do_register(self) -> None:
        former = self.generation
        self.generation = max(time.time_ns(), former + 1)
        owned = self._owned.snapshot()
        self._sequence = 0
        self._in_flight = None
        card = self._card(self.generation)
        await self._name_model(card.model)
        event = registry.Event(self._worker_id, self.generation, 0)
        held = await self._register(
            keys=[
                *self._own_keys(),
                self._keys.owned(self._worker_id, former),
                self._keys.sequence(self._worker_id, former),
            ],
            args=[
                self._worker_id,
                self.generation,
                registry.LEASE_TTL_MS,
                registry.encode_card(card),
                owned,
                scripts.MAX_EVENTS,
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
            "registered as %s, generation %d, %d blocks",
            self._worker_id,
            self.generation,
            len(owned) // 8,
        )

    async def _name_model(self, card: ModelCard) -> None:
        """Put the model in the list, unless other workers serve it under another card.

        Then routers refuse this worker, until the others are gone: tried at every renewal.
        """
        data = registry.encode_card(card)
        if await self._redis.hsetnx(registry.MODELS_KEY, card.name, data):
            return
        if await self._redis.hget(registry.MODELS_KEY, card.name) == data:
            return
        others = set(await self._redis.zrange(self._keys.workers, 0, -1))
        if not others - {self._worker_id.encode()}:
            await self._redis.hset(registry.MODELS_KEY, card.name, data)

    async def _do_renew(self) -> None:
        renewed = await self._renew(
            keys=self._own_keys(),
            args=[self._worker_id, self.generation, registry.LEASE_TTL_MS],
        )
        if renewed:
            await self._name_model(self._card(self.generation).model)
            self._schedule_renewal()
        else:
            self._lose()

    async def _do_publish(self) -> None:
        if self._in_flight is None:
            self._in_flight = self._owned.take(MAX_EVENT_IDS)
            self._sequence += 1
        change = self._in_flight
        event = registry.Event(
            self._worker_id, self.generation, self._sequence, change.stored, change.removed
        )
        _, _, owned, sequence, _, events = self._own_keys()
        published = await self._publish(
            keys=[self._keys.lease(self._worker_id), owned, sequence, events],
            args=[
                self.generation,
                self._sequence,
                registry.LEASE_TTL_MS,
                scripts.MAX_EVENTS,
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
        await self._leave(
            keys=self._own_keys(),
            args=[
                self._worker_id,
                self.generation,
                registry.LEASE_TTL_MS,
                scripts.MAX_EVENTS,
                *_flat(event),
            ],
        )

    def _lose(self) -> None:
        log.warning(
            "the lease of %s, generation %d, is lost (Redis was away, or another worker has "
            "this id): registering anew",
            self._worker_id,
            self.generation,
        )
        self.registered.clear()

    def _schedule_renewal(self) -> None:
        self._renew_at = time.monotonic() + registry.LEASE_RENEW_MS / 1000

    def _own_keys(self) -> list[str]:
        """Lease, card, owned, seq, workers, events."""
        keys, worker_id = self._keys, self._worker_id
        return [
            keys.lease(worker_id),
            keys.worker(worker_id),
            keys.owned(worker_id, self.generation),
            keys.sequence(worker_id, self.generation),
            keys.workers,
            keys.events,
        ]


def _flat(event: registry.Event) -> Iterator[bytes | str | int]:
    return itertools.chain.from_iterable(registry.event_fields(event).items())
