"""Who holds what, from Redis into the fleet: the only file here that talks to Redis.

`headrace.registry` says what stands there and how a reader follows a partition.
One task reads the list of models; one task per model's partition polls its
members about once a second, loads what is new, and follows the events between.

When Redis can't be reached the fleet stays as it is. After an outage, a restart
or a loss of all data it is kept too, until Redis has been there for a whole
LEASE_TTL_MS without a break: by then every live worker has renewed its lease,
and a lease that is missing means what it says (see `contact`).

Blocks of tiers other than the device's are not indexed yet; their events count.

A task that talks to Redis is ended by a flag and a cancellation: on Python 3.11
`asyncio.wait_for`, through which the client writes, loses a cancellation that comes
as the write completes, and a task that trusted it alone would follow for ever.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from headrace.registry import (
    LEASE_TTL_MS,
    MODELS_KEY,
    Event,
    Keys,
    connect,
    decode_model_card,
    decode_worker_card,
    parse_event,
    unpack_short_ids,
)
from headrace.service import cancel_and_wait
from services.router.contact import Contact, StreamId
from services.router.fleet import why_refused

if TYPE_CHECKING:
    from headrace.registry import ModelCard, WorkerCard
    from services.router.fleet import Fleet

log = logging.getLogger("headrace.router")

POLL_S = 1.0
#: When something says that a worker is changing hands.
_POLL_SOON_S = 0.1
#: How long one read of the stream waits; below the socket's timeout.
BLOCK_MS = 500
_EVENTS_PER_READ = 256
_BACKOFF_S = (0.05, 1.0)
#: A worker whose card and lease disagree is changing hands: read it again.
_LOAD_ATTEMPTS = 3


class Ownership:
    """Keeps `fleet` equal to what Redis says. `start` inside the loop, `close` at the end.

    `contacted` is set once all that Redis said at first is in the fleet.
    `lease_ttl_ms` is how long a worker may take to renew its lease.
    """

    def __init__(
        self,
        url: str,
        fleet: Fleet,
        *,
        num_partitions: int = 1,
        lease_ttl_ms: int = LEASE_TTL_MS,
    ) -> None:
        self.contacted = asyncio.Event()
        self._redis = connect(url)
        self._fleet = fleet
        self._num_partitions = num_partitions
        self._lease_ttl_ms = lease_ttl_ms
        self._contact = Contact(lease_ttl_ms)
        self._partitions: dict[str, list[_Partition]] = {}
        self._task: asyncio.Task[object] | None = None
        self._closing = False

    @property
    def connected(self) -> bool:
        """Whether Redis answers every task that follows it."""
        return all(contact.unbroken for contact in self._contacts())

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
        await self._redis.aclose()

    def poll_soon(self) -> None:
        """Something says that members have changed."""
        for partition in self._all_partitions():
            partition.poll_soon()

    def _contacts(self) -> list[Contact]:
        return [self._contact, *(partition.contact for partition in self._all_partitions())]

    def _all_partitions(self) -> list[_Partition]:
        return [partition for group in self._partitions.values() for partition in group]

    async def _follow_models(self) -> None:
        loop = asyncio.get_running_loop()
        backoff = _Backoff("the list of models")
        while not self._closing:
            try:
                async with self._redis.pipeline(transaction=True) as pipe:
                    pipe.info("server")
                    pipe.hgetall(MODELS_KEY)
                    info, found = await pipe.execute()
                self._contact.made(loop.time(), info["run_id"])
                await self._take_models(found, loop.time())
                backoff.over()
                if self.polls or not self._partitions:
                    self.contacted.set()
                await asyncio.sleep(POLL_S if self.contacted.is_set() else _BACKOFF_S[0])
            except (RedisError, OSError) as error:
                self._contact.broken()
                await backoff.wait(error)

    async def _take_models(self, found: dict[bytes, bytes], now: float) -> None:
        cards: dict[str, ModelCard] = {}
        for field, data in found.items():
            try:
                card = decode_model_card(data)
            except ValueError as error:
                log.error("%s holds a malformed card of %r: %s", MODELS_KEY, field, error)
                continue
            cards[card.name] = card
        for card in cards.values():
            self._fleet.set_model(card)
            if card.name not in self._partitions:
                self._partitions[card.name] = [
                    _Partition(
                        self._redis,
                        self._fleet,
                        Keys(card.name, number),
                        Contact(self._lease_ttl_ms),
                    )
                    for number in range(self._num_partitions)
                ]
        if not self._contact.is_settled(now):
            return
        for name in self._fleet.models.keys() - cards.keys():
            if not self._fleet.models[name].workers:
                await self._end_partitions(name)
                self._fleet.drop_model(name)

    async def _end_partitions(self, model: str) -> None:
        partitions = self._partitions.pop(model, [])
        for partition in partitions:
            partition.closing = True
        await cancel_and_wait(*(partition.task for partition in partitions))


class _Partition:
    """Follows the workers of one partition of one model; the only task that changes them."""

    def __init__(self, redis: Any, fleet: Fleet, keys: Keys, contact: Contact) -> None:
        self.contact = contact
        #: How often the members were compared with Redis.
        self.polls = 0
        self.closing = False
        self._redis = redis
        self._fleet = fleet
        self._model = keys.model
        self._keys = keys
        #: Up to here the stream has been read; None before the first poll.
        self._position: StreamId | None = None
        self._poll_at = 0.0
        #: Sequences that the last poll found, and the stream's end then.
        self._expected: dict[str, tuple[int, int]] = {}
        self._expected_at = StreamId(0, 0)
        self._loop = asyncio.get_running_loop()
        self.task: asyncio.Task[None] = asyncio.create_task(
            self._follow(), name=f"partition {self._keys.tag}"
        )

    def poll_soon(self) -> None:
        self._poll_at = min(self._poll_at, self._loop.time() + _POLL_SOON_S)

    async def _follow(self) -> None:
        backoff = _Backoff(f"model {self._model}")
        while not self.closing:
            try:
                if self._loop.time() >= self._poll_at:
                    await self._poll()
                await self._read()
                backoff.over()
            except (RedisError, OSError) as error:
                self.contact.broken()
                self._poll_at = 0.0
                await backoff.wait(error)
            except Exception:
                # A fault of ours must not end the following for ever.
                log.exception("model %s: following its workers failed", self._model)
                self._poll_at = 0.0
                await asyncio.sleep(_BACKOFF_S[1])

    async def _poll(self) -> None:
        """Compare members, leases and sequences with the fleet; load and remove workers."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.info("server")
            pipe.zrange(self._keys.workers, 0, -1)
            pipe.xrevrange(self._keys.events, count=1)
            info, listed, newest = await pipe.execute()
        self._in_contact(info, newest)
        self._poll_at = self._loop.time() + POLL_S
        model = self._fleet.models[self._model]
        ids = sorted({_text(id_) for id_ in listed} | model.workers.keys() | model.refused.keys())
        if ids:
            await self._poll_workers(ids)
        self.polls += 1

    async def _poll_workers(self, ids: list[str]) -> None:
        members = self._fleet.models[self._model].workers
        async with self._redis.pipeline(transaction=True) as pipe:
            # In one transaction with the leases: a Redis that lost its data since the
            # members were listed must not pass for one in which all leases ended.
            pipe.info("server")
            for worker_id in ids:
                generation = members[worker_id].key.generation if worker_id in members else 0
                pipe.get(self._keys.worker(worker_id))
                pipe.get(self._keys.lease(worker_id))
                pipe.get(self._keys.sequence(worker_id, generation))
            # In one transaction with the sequences: what they count stands before it.
            pipe.xrevrange(self._keys.events, count=1)
            info, *answers, newest = await pipe.execute()
        self._expected, self._expected_at = {}, self._in_contact(info, newest)
        for i, worker_id in enumerate(ids):
            card_data, lease, sequence = answers[3 * i : 3 * i + 3]
            member = members.get(worker_id)
            card = self._card(worker_id, card_data)
            if lease is None or card is None:
                self._lapsed(worker_id)
            elif _number(lease) != card.generation:
                self.poll_soon()
            elif not self._agrees(card):
                continue
            elif member is None:
                await self._load(worker_id, "new")
            elif member.key.generation < card.generation:
                await self._load(worker_id, "new generation")
            else:
                self._expected[worker_id] = (member.key.generation, _number(sequence))

    def _in_contact(self, info: dict[str, str], newest: list[tuple[bytes, Any]]) -> StreamId:
        """Redis answered, as this process with this newest event. Returns the stream's end."""
        end = _end(newest)
        lost_data = self._position is not None and end < self._position
        self.contact.made(self._loop.time(), info["run_id"], lost_data=lost_data)
        if self._position is None or lost_data:
            self._position = end
        return end

    def _lapsed(self, worker_id: str) -> None:
        """The worker's lease or card is missing."""
        if not self.contact.is_settled(self._loop.time()):
            return
        if self._fleet.worker(self._model, worker_id) is not None:
            log.warning("worker %s is gone: its lease ended", worker_id)
        self._fleet.leave(self._model, worker_id)

    def _agrees(self, card: WorkerCard) -> bool:
        """Whether the worker may serve the model; if not, it is refused."""
        reason = why_refused(card, self._fleet.models[self._model].card)
        if reason:
            self._fleet.refuse(self._model, card, reason)
        return not reason

    async def _read(self) -> None:
        """Apply the next events, waiting for them until the next poll is due."""
        wait_ms = min(BLOCK_MS, max(1, int((self._poll_at - self._loop.time()) * 1000)))
        answer = await self._redis.xread(
            {self._keys.events: str(self._position or "0-0")},
            count=_EVENTS_PER_READ,
            block=wait_ms,
        )
        entries = answer[0][1] if answer else []
        position = self._expected_at
        for entry_id, fields in entries:
            try:
                await self._apply(parse_event(fields))
            except ValueError as error:
                # The gap that it leaves in its worker's sequence makes that worker reload.
                log.error("%s: entry %s: %s", self._keys.events, _text(entry_id), error)
            self._position = position = StreamId.parse(entry_id)
        if self._expected and position >= self._expected_at:
            await self._check_trimmed()

    async def _apply(self, event: Event) -> None:
        model = self._fleet.models[self._model]
        member = model.workers.get(event.worker_id)
        known = member.key.generation if member else 0
        if event.generation < known:
            return
        if event.is_departure:
            log.info("worker %s left", event.worker_id)
            self._fleet.leave(self._model, event.worker_id)
        elif member is None or event.generation > known:
            refused = model.refused.get(event.worker_id)
            if refused is None or refused.card.generation < event.generation:
                await self._load(event.worker_id, "new" if member is None else "new generation")
        elif event.sequence == member.sequence + 1:
            self._fleet.apply(member, event)
        elif event.sequence > member.sequence:
            await self._load(
                event.worker_id, f"gap: event {event.sequence} after {member.sequence}"
            )

    async def _check_trimmed(self) -> None:
        """All events up to the last poll were read: what is still missing was trimmed away."""
        expected, self._expected = self._expected, {}
        for worker_id, (generation, sequence) in expected.items():
            member = self._fleet.worker(self._model, worker_id)
            if (
                member is not None
                and member.key.generation == generation
                and member.sequence < sequence
            ):
                await self._load(
                    worker_id, f"trimmed: event {sequence} is past, {member.sequence} was seen"
                )

    async def _load(self, worker_id: str, cause: str) -> None:
        """Read one worker anew: its card, and its blocks with their sequence."""
        for _ in range(_LOAD_ATTEMPTS):
            card = self._card(worker_id, await self._redis.get(self._keys.worker(worker_id)))
            if card is None or not self._agrees(card):
                return
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.get(self._keys.lease(worker_id))
                pipe.get(self._keys.owned(worker_id, card.generation))
                pipe.get(self._keys.sequence(worker_id, card.generation))
                lease, owned, sequence = await pipe.execute()
            if _number(lease) == card.generation:
                await self._take(card, owned or b"", _number(sequence), cause)
                return

    async def _take(self, card: WorkerCard, owned: bytes, sequence: int, cause: str) -> None:
        worker = self._fleet.worker(self._model, card.worker_id)
        if worker is None or worker.key.generation < card.generation:
            worker = self._fleet.join(self._model, card)
        elif worker.key.generation > card.generation:
            return
        try:
            ids = unpack_short_ids(owned)
        except ValueError as error:
            log.error("the owned blocks of worker %s are malformed: %s", card.worker_id, error)
            ids = []
        for _ in self._fleet.load_blocks(worker, ids, sequence, cause):
            await asyncio.sleep(0)
        num_blocks = self._fleet.index.num_owned(worker.slot)
        log.info("worker %s: loaded %d blocks (%s)", card.worker_id, num_blocks, cause)

    def _card(self, worker_id: str, data: bytes | None) -> WorkerCard | None:
        if data is None:
            return None
        try:
            card = decode_worker_card(data)
        except ValueError as error:
            log.error("the card of worker %s is malformed: %s", worker_id, error)
            return None
        if card.worker_id != worker_id:
            log.error("the card of worker %s names worker %s", worker_id, card.worker_id)
            return None
        return card


class _Backoff:
    """Waits longer from failure to failure, and says when an outage begins and ends."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._wait_s = _BACKOFF_S[0]
        self._failing = False

    async def wait(self, error: Exception) -> None:
        if not self._failing:
            log.warning("Redis does not answer (%s): %s", self._what, error)
        self._failing = True
        await asyncio.sleep(self._wait_s)
        self._wait_s = min(2 * self._wait_s, _BACKOFF_S[1])

    def over(self) -> None:
        if self._failing:
            log.info("Redis answers again (%s)", self._what)
        self._failing = False
        self._wait_s = _BACKOFF_S[0]


def _end(newest: list[tuple[bytes, Any]]) -> StreamId:
    """The id of a stream's last entry, from XREVRANGE … COUNT 1."""
    return StreamId.parse(newest[0][0]) if newest else StreamId(0, 0)


def _number(data: bytes | None) -> int:
    """A generation or sequence; 0, which no generation is, when missing or malformed."""
    return int(data) if data is not None and data.isdigit() else 0


def _text(data: bytes | str) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data
