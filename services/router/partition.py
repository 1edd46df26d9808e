"""One partition of one model's workers, followed from Redis into the fleet.

`headrace.registry` says how. What a worker's events leave open (a gap, a new
generation, events that were trimmed away, a malformed one) makes this load that
worker anew, and only that one. It knows nothing of other models and partitions.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from headrace.registry import (
    Event,
    Keys,
    decode_worker_card,
    parse_event,
    partition_of,
    unpack_short_ids,
)
from services.router.contact import Contact, StreamId
from services.router.fleet import why_refused

if TYPE_CHECKING:
    from headrace.redis_outage import Outage
    from headrace.redis_servers import Servers
    from headrace.registry import WorkerCard
    from services.router.fleet import Fleet, Worker

log = logging.getLogger("headrace.router")

POLL_S = 1.0
#: When something says that a worker is changing hands.
_POLL_SOON_S = 0.1
#: How long one read of the stream waits; below the socket's timeout.
BLOCK_MS = 500
_EVENTS_PER_READ = 256
#: Ids that are applied before others get their turn: decisions wait for no more.
_SLICE_LEN = 512
#: After a fault of ours.
_RETRY_S = 1.0
#: A worker whose card and lease disagree is changing hands: read it again.
_LOAD_ATTEMPTS = 3


class Partition:
    """Follows partition `place` = (number, of how many); the only task that changes its workers.

    It begins at once, and ends when `closing` is set and `task` cancelled.
    """

    def __init__(
        self,
        servers: Servers,
        fleet: Fleet,
        model: str,
        place: tuple[int, int],
        contact: Contact,
        outage: Outage,
    ) -> None:
        self.contact = contact
        #: How often the members were compared with Redis.
        self.polls = 0
        self.closing = False
        self._servers = servers
        self._fleet = fleet
        self._model = model
        self._number, self._num_partitions = place
        self._keys = Keys(model, self._number)
        self._outage = outage
        #: Up to here the stream has been read; None before the first poll.
        self._position: StreamId | None = None
        self._poll_at = 0.0
        #: Sequences that the last poll found, and the stream's end then.
        self._expected: dict[str, tuple[int, int]] = {}
        self._expected_at = StreamId(0, 0)
        #: Generations that events named since the last poll and Redis does not know.
        self._unknown: set[tuple[str, int]] = set()
        self._loop = asyncio.get_running_loop()
        self.task: asyncio.Task[None] = asyncio.create_task(
            self._follow(), name=f"partition {self._keys.tag}"
        )

    @property
    def trouble(self) -> str:
        """What is wrong with Redis now; empty while all is well."""
        return self._outage.cause

    def poll_soon(self) -> None:
        """Compare members with Redis before it is due."""
        self._poll_at = min(self._poll_at, self._loop.time() + _POLL_SOON_S)

    async def _redis(self) -> Any:
        return await self._servers.of(self._keys.events)

    def _is_here(self, worker_id: str) -> bool:
        return partition_of(worker_id, self._num_partitions) == self._number

    async def _follow(self) -> None:
        while not self.closing:
            try:
                if self._loop.time() >= self._poll_at:
                    await self._poll()
                await self._read()
                self._outage.over()
            except (RedisError, OSError) as error:
                self.contact.broken()
                self._servers.lost()
                self._poll_at = 0.0
                await asyncio.sleep(self._outage.failed(error))
            except Exception:
                # A fault of ours must not end the following for ever.
                log.exception("model %s: following its workers failed", self._model)
                self._poll_at = 0.0
                await asyncio.sleep(_RETRY_S)

    async def _poll(self) -> None:
        """Compare members, leases and sequences with the fleet; load and remove workers."""
        redis = await self._redis()
        async with redis.pipeline(transaction=True) as pipe:
            pipe.info("server")
            pipe.zrange(self._keys.workers, 0, -1)
            pipe.xrevrange(self._keys.events, count=1)
            info, listed, newest = await pipe.execute()
        self._in_contact(info, newest)
        self._unknown.clear()
        self._poll_at = self._loop.time() + POLL_S
        model = self._fleet.models[self._model]
        ids = {_text(id_) for id_ in listed} | model.workers.keys() | model.refused.keys()
        ids = set(filter(self._is_here, ids))
        if ids:
            await self._poll_workers(sorted(ids))
        self.polls += 1

    async def _poll_workers(self, ids: list[str]) -> None:
        members = self._fleet.models[self._model].workers
        redis = await self._redis()
        async with redis.pipeline(transaction=True) as pipe:
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
            if lease is None or card_data is None:
                self._lapsed(worker_id, member)
            elif card is None:
                continue  # Its worker mends it when it renews the lease.
            elif _number(lease) != card.generation:
                self.poll_soon()
            elif not self._agrees(card):
                continue
            elif member is None:
                await self._load(worker_id, "new")
            elif member.key.generation < card.generation:
                await self._load(worker_id, "new generation")
            else:
                member.published = max(member.published, _number(sequence))
                self._expected[worker_id] = (member.key.generation, _number(sequence))

    def _in_contact(self, info: dict[str, str], newest: list[tuple[bytes, Any]]) -> StreamId:
        """Redis answered, as this process with this newest event. Returns the stream's end."""
        end = _end(newest)
        lost_data = self._position is not None and end < self._position
        self.contact.made(self._loop.time(), info["run_id"], lost_data=lost_data)
        if self._position is None or lost_data:
            self._position = end
        return end

    def _lapsed(self, worker_id: str, member: Worker | None) -> None:
        """The worker's lease or card is missing."""
        ttl_ms = member.card.lease_ttl_ms if member else 0
        if not self.contact.is_settled(self._loop.time(), ttl_ms):
            return
        if member is not None:
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
        if self._expected:
            # What the poll found is compared as soon as all that is there was read.
            wait_ms = 1
        redis = await self._redis()
        answer = await redis.xread(
            {self._keys.events: str(self._position or "0-0")},
            count=_EVENTS_PER_READ,
            block=wait_ms,
        )
        entries = answer[0][1] if answer else []
        position = self._expected_at
        num_ids = 0
        for entry_id, fields in entries:
            try:
                event = parse_event(fields)
                await self._apply(event)
                num_ids += len(event.stored) + len(event.removed)
                if num_ids >= _SLICE_LEN:
                    num_ids = 0
                    await asyncio.sleep(0)
            except ValueError as error:
                # The gap that it leaves in its worker's sequence makes that worker reload.
                log.error("%s: entry %s: %s", self._keys.events, _text(entry_id), error)
            self._position = position = StreamId.parse(entry_id)
        if self._expected and position >= self._expected_at:
            await self._check_trimmed()

    async def _apply(self, event: Event) -> None:
        if not self._is_here(event.worker_id):
            return
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
                await self._find(event, "new" if member is None else "new generation")
        elif event.sequence == member.sequence + 1:
            self._fleet.apply(member, event)
        elif event.sequence > member.sequence:
            await self._load(
                event.worker_id, f"gap: event {event.sequence} after {member.sequence}"
            )

    async def _find(self, event: Event, cause: str) -> None:
        """An event names a generation that is not known: look once, until the next poll."""
        named = event.worker_id, event.generation
        if named in self._unknown:
            return
        await self._load(event.worker_id, cause, event.generation)
        worker = self._fleet.worker(self._model, event.worker_id)
        if worker is None or worker.key.generation < event.generation:
            self._unknown.add(named)

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

    async def _load(self, worker_id: str, cause: str, at_least: int = 0) -> None:
        """Read one worker anew: its card, and its blocks with their sequence.

        One of an older generation than `at_least` is left as it is.
        """
        for _ in range(_LOAD_ATTEMPTS):
            redis = await self._redis()
            card = self._card(worker_id, await redis.get(self._keys.worker(worker_id)))
            if card is None or card.generation < at_least or not self._agrees(card):
                return
            async with redis.pipeline(transaction=True) as pipe:
                pipe.get(self._keys.lease(worker_id))
                pipe.get(self._keys.sequence(worker_id, card.generation))
                for tier in card.tiers:
                    pipe.get(self._keys.owned(worker_id, card.generation, tier))
                lease, sequence, *owned = await pipe.execute()
            if _number(lease) == card.generation:
                by_tier = dict(zip(card.tiers, owned, strict=True))
                await self._take(card, by_tier, _number(sequence), cause)
                return

    async def _take(
        self, card: WorkerCard, owned: dict[str, bytes | None], sequence: int, cause: str
    ) -> None:
        worker = self._fleet.worker(self._model, card.worker_id)
        if worker is None or worker.key.generation < card.generation:
            worker = self._fleet.join(self._model, card)
        elif worker.key.generation > card.generation:
            return
        ids: dict[str, list[int]] = {}
        for tier, packed in owned.items():
            try:
                ids[tier] = unpack_short_ids(packed or b"")
            except ValueError as error:
                log.error("%s blocks of worker %s are malformed: %s", tier, card.worker_id, error)
        for _ in self._fleet.load_blocks(worker, ids, sequence, cause):
            await asyncio.sleep(0)
        num_blocks = sum(self._fleet.num_owned(worker).values())
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


def _end(newest: list[tuple[bytes, Any]]) -> StreamId:
    """The id of a stream's last entry, from XREVRANGE … COUNT 1."""
    return StreamId.parse(newest[0][0]) if newest else StreamId(0, 0)


def _number(data: bytes | None) -> int:
    """A generation or sequence; 0, which no generation is, when missing or malformed."""
    return int(data) if data is not None and data.isdigit() else 0


def _text(data: bytes | str) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data
