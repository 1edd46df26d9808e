"""What stands in Redis: keys, cards and packed ids, as worker and router share them.

All keys of a model's partition carry one hash tag, so that one script may touch
them on a cluster:

    headrace:v1:models                              hash   model -> ModelCard (JSON)
    headrace:v1:{<model>:<p>}:workers               zset   worker id -> when its lease ends (ms)
    headrace:v1:{<model>:<p>}:worker:<id>           string WorkerCard (JSON)
    headrace:v1:{<model>:<p>}:lease:<id>            string generation, with the TTL
    headrace:v1:{<model>:<p>}:owned:<id>:<g>:<tier> string 8 bytes a slot: a short id, or 0
    headrace:v1:{<model>:<p>}:seq:<id>:<g>          string number of the last event
    headrace:v1:{<model>:<p>}:events                stream of Event

A model's workers are spread over the partitions 0 … P-1. P stands in the model's
card in `models`, and nowhere else counts: the worker that names the model decides it
(`--partitions`), every other one goes by what it finds there, and a reader follows all
P. Which is a worker's partition follows from its id (`partition_of`), so that a reader
ignores keys that stand in another, left over from another P.

An owned set is a packed string: a Redis set costs 50 bytes an id, this 8. The
worker's publisher gives every id a slot; a reader ignores slots that are 0. There is
one for each tier of the worker's card; an event concerns one tier, and the sequence
counts the events of all of them.

How a reader follows a partition:

1. It notes the stream's last id (XREVRANGE … COUNT 1; `0-0` if there is none), then
   reads `workers`, and for each member the card, which names the generation g.
2. It loads a worker in one MULTI: `lease:<id>`, `owned:<id>:<g>:<tier>`, `seq:<id>:<g>`,
   and takes it only if the lease holds g; else the worker is changing hands: read the
   card again. `owned` and `seq` change in one script, so that they agree.
3. It follows `events` from the noted id, and for an event of worker w, generation g:
   - `is_registration` (sequence 0): w lives as generation g and its keys are written.
     If g is newer than what is known, what was known of w is void: load w (step 2).
   - `is_departure` (sequence 0, tier "gone"): generation g stopped cleanly, its keys are
     deleted. Remove w unless a newer generation of it is known.
   - sequence n: of an older generation, or n ≤ the known sequence: ignore it (a repeat, or
     the snapshot has it). n = known + 1: first take `removed` away, then add `stored`
     (no id is in both). Otherwise there is a gap, or an unknown generation: load w.
4. Now and then it compares `seq` with what it saw, for events that were trimmed away.

Generations grow, and are new at every start of a worker and whenever it found its lease
lost or taken; each comes with a registration. Nothing of an old generation is written
again. All keys expire with the lease, the stream with the last worker's; a stream that
comes back goes on with larger ids. `models` alone stays, a card for every model's name.

What Redis is asked to do is in its version 6.2 and every later one, and in every Valkey.
This module holds no state, and opens no connection but through `connect`.
"""

from __future__ import annotations

import zlib
from array import array
from typing import TYPE_CHECKING, Annotated

import msgspec

from headrace.blocks import SHORT_ID_LEN
from headrace.redis_servers import connect as connect
from headrace.redis_servers import redact as redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PREFIX = "headrace:v1"
MODELS_KEY = f"{PREFIX}:models"

#: The tier that every engine has: blocks in the device's own memory.
DEVICE_TIER = "device"

#: How long a lease lives without being renewed, unless the worker's card says otherwise.
LEASE_TTL_MS = 6000
#: In that time it is renewed so often: some renewals may be lost.
LEASE_RENEWALS = 4

#: A reader has a connection for each partition of each model.
MAX_PARTITIONS = 256

#: The fields of a model's card that its workers must agree on, or find wrong blocks.
MODEL_IDENTITY = ("name", "revision", "tokenizer_digest", "block_size")

#: The tier of the event with which a worker leaves.
GONE_TIER = "gone"


class ModelCard(msgspec.Struct, frozen=True):
    """What workers that serve one model must agree on."""

    name: str
    revision: str
    tokenizer_digest: str
    context_len: int
    block_size: int
    modalities: tuple[str, ...] = ("text",)
    created: int = 0
    num_partitions: Annotated[int, msgspec.Meta(ge=1, le=MAX_PARTITIONS)] = 1


class WorkerCard(msgspec.Struct, frozen=True):
    """One worker process, as it tells others."""

    worker_id: str
    generation: int
    address: str
    model: ModelCard
    engine: str
    hash_vector: str
    total_blocks: int
    role: str = "complete"
    cluster: str = ""
    resume: str = "exact"
    adapters: tuple[str, ...] = ()
    tiers: tuple[str, ...] = (DEVICE_TIER,)
    lease_ttl_ms: int = LEASE_TTL_MS
    #: Sequences that one step runs at most; 0: not said.
    max_sequences: int = 0
    #: By tier, what bringing one block of it to the device takes, in ms; empty: not said.
    tier_ms_per_block: tuple[float, ...] = ()


class Event(msgspec.Struct, frozen=True):
    """One change of one worker's blocks; `sequence` grows by one from event to event.

    Sequence 0 is a generation's first or last event and changes no block by itself.
    """

    worker_id: str
    generation: int
    sequence: int
    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    tier: str = DEVICE_TIER

    @property
    def is_registration(self) -> bool:
        """This generation is new and its keys are written: load them."""
        return self.sequence == 0 and self.tier != GONE_TIER

    @property
    def is_departure(self) -> bool:
        """This generation stopped cleanly and its keys are deleted."""
        return self.sequence == 0 and self.tier == GONE_TIER


class Keys:
    """The keys of one partition of one model's workers."""

    def __init__(self, model: str, partition: int = 0) -> None:
        self.model = model
        self.tag = f"{PREFIX}:{{{model}:{partition}}}"
        self.workers = f"{self.tag}:workers"
        self.events = f"{self.tag}:events"

    def worker(self, worker_id: str) -> str:
        return f"{self.tag}:worker:{worker_id}"

    def lease(self, worker_id: str) -> str:
        return f"{self.tag}:lease:{worker_id}"

    def owned(self, worker_id: str, generation: int, tier: str = DEVICE_TIER) -> str:
        return f"{self.tag}:owned:{worker_id}:{generation}:{tier}"

    def sequence(self, worker_id: str, generation: int) -> str:
        return f"{self.tag}:seq:{worker_id}:{generation}"


def partition_of(worker_id: str, num_partitions: int) -> int:
    """The partition that a worker's keys live in."""
    return zlib.crc32(worker_id.encode()) % num_partitions


def pack_short_ids(ids: Iterable[int]) -> bytes:
    """Short ids as little-endian u64."""
    return array("Q", ids).tobytes()


def unpack_short_ids(data: bytes) -> list[int]:
    """The inverse of `pack_short_ids`; slots that are 0 included. Raises ValueError."""
    if len(data) % SHORT_ID_LEN:
        raise ValueError(f"{len(data)} bytes are not a whole number of block ids")
    return array("Q", data).tolist()


def event_fields(event: Event) -> dict[str, bytes | str | int]:
    """An event as the fields of a stream entry."""
    return {
        "w": event.worker_id,
        "g": event.generation,
        "s": event.sequence,
        "t": event.tier,
        "+": pack_short_ids(event.stored),
        "-": pack_short_ids(event.removed),
    }


def parse_event(fields: Mapping[bytes, bytes]) -> Event:
    """The inverse of `event_fields`, as Redis returns it. Raises ValueError when malformed."""
    try:
        return Event(
            worker_id=fields[b"w"].decode(),
            generation=int(fields[b"g"]),
            sequence=int(fields[b"s"]),
            tier=fields[b"t"].decode(),
            stored=tuple(unpack_short_ids(fields[b"+"])),
            removed=tuple(unpack_short_ids(fields[b"-"])),
        )
    except (KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"malformed event: {error!r}") from error


def encode_card(card: ModelCard | WorkerCard) -> bytes:
    """A card as JSON."""
    return msgspec.json.encode(card)


def decode_worker_card(data: bytes) -> WorkerCard:
    """The inverse of `encode_card`. Raises ValueError when malformed."""
    return msgspec.json.decode(data, type=WorkerCard)


def decode_model_card(data: bytes) -> ModelCard:
    """The inverse of `encode_card`. Raises ValueError when malformed."""
    return msgspec.json.decode(data, type=ModelCard)
