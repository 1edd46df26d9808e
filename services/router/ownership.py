"""Who holds what, from Redis into the fleet: the models and their partitions.

`headrace.registry` says what stands in Redis and how a reader follows a partition.
One task reads the list of models; one task per model's partition (`partition.py`)
polls its members about once a second, loads what is new, and follows the events between.

When Redis can't be reached the fleet stays as it is. After an outage, a restart
or a loss of all data it is kept too, until Redis has been there for a whole lease's
TTL without a break: by then every live worker has renewed its lease, and a lease
that is missing means what it says (see `contact`).

A task that talks to Redis is ended by a flag and a cancellation: on Python 3.11
`asyncio.wait_for`, through which the client writes, loses a cancellation that comes
as the write completes, and a task that trusted it alone would follow for ever.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from headrace import redis_servers
from headrace.redis_outage import Outage
from headrace.registry import LEASE_TTL_MS, MODELS_KEY, decode_model_card, redact
from headrace.service import cancel_and_wait
from services.router.contact import Contact
from services.router.partition import POLL_S, Partition

if TYPE_CHECKING:
    from headrace.registry import ModelCard
    from services.router.fleet import Fleet

log = logging.getLogger("headrace.router")

#: Until all that Redis said at first is in the fleet.
_FIRST_POLL_S = 0.05


class Ownership:
    """Keeps `fleet` equal to what Redis says. `start` inside the loop, `close` at the end.

    `contacted` is set once all that Redis said at first is in the fleet.
    `lease_ttl_ms` is how long any worker may take to renew its lease, at least; its
    card may say longer. Raises StartupError for a bad URL.
    """

    def __init__(self, url: str, fleet: Fleet, *, lease_ttl_ms: int = LEASE_TTL_MS) -> None:
        self.contacted = asyncio.Event()
        self._servers = redis_servers.servers(url)
        self._url = redact(url)
        self._fleet = fleet
        self._lease_ttl_ms = lease_ttl_ms
        self._contact = Contact(lease_ttl_ms)
        self._outage = Outage(log, f"{self._url} (the list of models)")
        self._partitions: dict[str, list[Partition]] = {}
        #: Malformed entries that have been said.
        self._malformed: dict[bytes, bytes] = {}
        self._task: asyncio.Task[object] | None = None
        self._closing = False

    @property
    def connected(self) -> bool:
        """Whether Redis answers every task that follows it."""
        return all(contact.unbroken for contact in self._contacts())

    @property
    def trouble(self) -> str:
        """What is wrong with Redis now, and its cure; empty while all is well."""
        causes = [partition.trouble for partition in self._all_partitions()]
        return next(filter(None, [self._outage.cause, *causes]), "")

    @property
    def settled(self) -> bool:
        """Whether a lease that is missing now counts as ended, everywhere."""
        now = asyncio.get_running_loop().time()
        return all(contact.is_settled(now) for contact in self._contacts())

    @property
    def polls(self) -> int:
        """How often every partition's members were compared with Redis, at least."""
        return min((partition.polls for partition in self._all_partitions()), default=0)

    def start(self) -> None:
        """Follow Redis from now on."""
        self._task = asyncio.create_task(self._follow_models(), name="models")

    async def close(self) -> None:
        """Follow no more, and disconnect."""
        self._closing = True
        await cancel_and_wait(self._task)
        for name in list(self._partitions):
            await self._end_partitions(name)
        await self._servers.aclose()

    def poll_soon(self) -> None:
        """Something says that members have changed."""
        for partition in self._all_partitions():
            partition.poll_soon()

    def _contacts(self) -> list[Contact]:
        return [self._contact, *(partition.contact for partition in self._all_partitions())]

    def _all_partitions(self) -> list[Partition]:
        return [partition for group in self._partitions.values() for partition in group]

    async def _follow_models(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closing:
            try:
                redis = await self._servers.of(MODELS_KEY)
                async with redis.pipeline(transaction=True) as pipe:
                    pipe.info("server")
                    pipe.hgetall(MODELS_KEY)
                    info, found = await pipe.execute()
                self._contact.made(loop.time(), info["run_id"])
                await self._take_models(found, loop.time())
                self._outage.over()
                if self.polls or not self._partitions:
                    self.contacted.set()
                await asyncio.sleep(POLL_S if self.contacted.is_set() else _FIRST_POLL_S)
            except (RedisError, OSError) as error:
                self._contact.broken()
                self._servers.lost()
                await asyncio.sleep(self._outage.failed(error))

    async def _take_models(self, found: dict[bytes, bytes], now: float) -> None:
        cards: dict[str, ModelCard] = {}
        for field, data in found.items():
            card = self._parse(field, data)
            if card is not None:
                cards[card.name] = card
        for card in cards.values():
            self._fleet.set_model(card)
            if len(self._partitions.get(card.name, ())) != card.num_partitions:
                await self._end_partitions(card.name)
                self._begin_partitions(card)
        if not self._contact.is_settled(now):
            return
        for name in self._fleet.models.keys() - cards.keys():
            if not self._fleet.models[name].workers:
                await self._end_partitions(name)
                self._fleet.drop_model(name)

    def _parse(self, field: bytes, data: bytes) -> ModelCard | None:
        try:
            card = decode_model_card(data)
            if card.name.encode() != field:
                raise ValueError(f"it names model {card.name!r}")
        except ValueError as error:
            if self._malformed.get(field) != data:
                log.error("%s holds a malformed card of %r: %s", MODELS_KEY, field, error)
            self._malformed[field] = data
            return None
        self._malformed.pop(field, None)
        return card

    def _begin_partitions(self, card: ModelCard) -> None:
        self._partitions[card.name] = [
            Partition(
                self._servers,
                self._fleet,
                card.name,
                (number, card.num_partitions),
                Contact(self._lease_ttl_ms),
                Outage(log, f"{self._url} (model {card.name}, partition {number})"),
            )
            for number in range(card.num_partitions)
        ]

    async def _end_partitions(self, model: str) -> None:
        partitions = self._partitions.pop(model, [])
        for partition in partitions:
            partition.closing = True
        await cancel_and_wait(*(partition.task for partition in partitions))
