"""Which process a request goes to. Pure: what waits and what is loaded in, a choice out.

    short   up to LONG_BYTES: any process, before all else that waits there
    part    of a batch, about PART_BYTES: any process, behind what is short
    long    the rest: not the processes that are kept free (one in eight, one at least)

A process can't be interrupted, so a short request may have to wait for what a
process is at: in one that is kept free never more than a few milliseconds, whatever
the others do. Those that do long work also let others have the processor first
(pool_process). The price is that long documents have fewer processes: of two, one.

Among those allowed the fewest queued bytes win, except that a conversation goes
where its last turn was, whose pieces that process remembers (see prefix_cache), as
long as little waits there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal
from zlib import crc32

from services.tokenizer import work

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["short", "part", "long"]

#: A longer request takes more than about 5 ms.
LONG_BYTES = 16 << 10
#: What of a batch is done at once, but for texts that are longer alone: about 1 ms.
PART_BYTES = 4 << 10
#: More parts than this get longer instead.
MAX_PARTS = 1024
#: What may wait for a process beyond the least before a conversation goes elsewhere.
_SLACK_BYTES = {"short": 16 << 10, "part": 0, "long": 256 << 10}
#: Shorter prompts cost less than going to one process only.
_MIN_SESSION_BYTES = 2 << 10
#: How much of a text tells whose it is.
_HEAD_LEN = 1024


def num_kept_free(num_processes: int) -> int:
    """How many processes take nothing long. A single one must take all."""
    return 0 if num_processes == 1 else max(1, num_processes // 8)


def kind_of(item: work.Work, length: int) -> Kind:
    """The kind of a request of `length` bytes."""
    if length > LONG_BYTES:
        return "long"
    return "part" if isinstance(item, work.EncodeBatch) else "short"


def session_of(item: work.Work, length: int) -> int | None:
    """The same number for all turns of a conversation: of a chat's instructions and its
    first message from anybody else, or of a text's beginning."""
    if length < _MIN_SESSION_BYTES:
        return None
    if isinstance(item, work.EncodeText):
        return crc32(item.text[:_HEAD_LEN].encode())
    if not isinstance(item, work.EncodeChat):
        return None
    number = 0
    for message in item.chat.messages:
        number = crc32(message.as_json or message.content.encode(), number)
        if message.role not in ("system", "developer"):
            break
    return number


def choose(
    loads: Sequence[tuple[int, int]], kind: Kind, session: int | None, kept_free: int
) -> int | None:
    """The place in `loads`, a slot and its queued bytes each, of the process that gets it.

    Slots below `kept_free` get nothing long. None if there is no process for it.
    A session's slot is the one that rendezvous hashing (Thaler and Ravishankar,
    1998) gives it among those there are.
    """
    allowed = [at for at, (slot, _) in enumerate(loads) if kind != "long" or slot >= kept_free]
    if not allowed:
        return None
    least = min(allowed, key=lambda at: loads[at][1])
    if session is None:
        return least
    home = max(allowed, key=lambda at: crc32(loads[at][0].to_bytes(2, "little"), session))
    return home if loads[home][1] - loads[least][1] <= _SLACK_BYTES[kind] else least


def split(batch: work.EncodeBatch) -> list[work.EncodeBatch]:
    """`batch` in parts of consecutive texts."""
    part_len = max(PART_BYTES, sum(map(len, batch.texts)) // MAX_PARTS)
    parts: list[list[bytes]] = []
    room = 0
    for text in batch.texts:
        # Many empty ones are not nothing.
        cost = len(text) + 16
        if cost > room or not parts:
            parts.append([])
            room = part_len
        parts[-1].append(text)
        room -= cost
    items, first = [], batch.first
    for texts in parts:
        items.append(work.EncodeBatch(batch.model, texts, batch.options, first))
        first += len(texts)
    return items


def joined(answers: Sequence[work.EncodedBatch]) -> work.EncodedBatch:
    """The answer to a batch, of its parts' answers in order."""
    return work.EncodedBatch(
        b"".join(answer.token_ids for answer in answers),
        b"".join(answer.counts for answer in answers),
        answers[0].tokenizer_digest,
    )
