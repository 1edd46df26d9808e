"""Who holds which block, in which tier: for a prompt, how many leading blocks each worker holds.

A worker has a slot: one bit in the planes of each tier (`block_table.py`). `reaches`
finds all ids of a prompt at once and ANDs the masks along it; a worker's count is
where its bit falls out. The tiers are numbered from the fastest; a slower tier's
answer counts the faster ones in, since a prefix may go on in host memory where the
device's ends.

    bit of a slot in `_live`      the slot's worker counts
    bit in a mask, not in `_live` left by a removed worker; `clean` takes it out
    slot in `_free`               its bit is in no mask: it may be given again

So a worker is out of all answers at once when it is removed, whatever it held. What
takes long is done in slices: `clean` sweeps removed workers' bits out, and moves ids
into a table twice as large when one is 3/8 full: first the system must give
it memory (`_next`), which takes tens of milliseconds for a large one. An id is

    in `_table`, or else in `_old` (while moving), or else in `_stash`

and only in one of them. The stash is a dict for the few ids whose bucket was full.

Plain memory: no clock, no I/O, no knowledge of what a worker or a block is.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from services.router.block_table import BlockTable
from services.router.prefix_walk import Walk, count_leading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from services.router.block_table import Ids, Positions

#: Ids that one slice of loading handles: about a millisecond.
SLICE_LEN = 512
#: Positions that one slice of cleaning looks at: as much.
CLEAN_LEN = 32_768
#: Moving a position, or looking at an id by itself, costs as much as sweeping so many.
_SWEEP_SPEED = 32
#: From here on ids are handled together.
_MANY = 24
_ALL = (1 << 64) - 1


class PrefixIndex:
    """Ownership of blocks by slots. Not thread-safe.

    It begins with room for `3/8 << log_capacity` ids, at least 3 << 3, and grows.
    `on_work` is called when there is something to `clean`.
    """

    def __init__(self, log_capacity: int = 12) -> None:
        self.on_work: Callable[[], None] = lambda: None
        self._table = BlockTable(log_capacity, 0)
        self._next: BlockTable | None = None
        #: Up to here `_next` has memory.
        self._touched = 0
        self._old: BlockTable | None = None
        #: Up to here `_old` is empty.
        self._moved = 0
        self._stash: dict[int, int] = {}
        #: Ids in `_table` and `_old`.
        self._num_placed = 0
        #: By tier, by word of slots: the plane's number.
        self._planes: list[list[int]] = [[]]
        #: By word: the bits of slots that are a worker's.
        self._live: list[int] = []
        #: By slot, by tier.
        self._num_owned: dict[int, list[int]] = {}
        self._removed: deque[int] = deque()
        #: Slots that the sweep in progress takes out, and how far it is.
        self._sweeping: list[int] = []
        self._swept = 0
        self._stash_left: list[int] = []
        self._free: list[int] = []
        self._num_slots = 0
        #: Prompts looked up by `look_ahead`, and where their ids are, until an id moves.
        self._ahead: dict[int, tuple[Ids, Positions, bool]] = {}

    def __len__(self) -> int:
        """Distinct block ids known, those of removed workers not yet cleaned included."""
        return self._num_placed + len(self._stash)

    @property
    def num_bytes(self) -> int:
        """Memory of the tables; a stashed id is counted as 150."""
        tables = filter(None, (self._table, self._next, self._old))
        return sum(table.num_bytes for table in tables) + 150 * len(self._stash)

    def add_worker(self) -> int:
        """A slot for a new worker, which owns nothing yet."""
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot = self._num_slots
            self._num_slots += 1
        self._num_owned[slot] = [0] * len(self._planes)
        word, bit = divmod(slot, 64)
        if word == len(self._live):
            self._live.append(0)
        self._live[word] |= 1 << bit
        return slot

    def remove_worker(self, slot: int) -> None:
        """The worker counts no more, from now on. Raises KeyError for a slot not given."""
        owned = self._num_owned.pop(slot)
        word, bit = divmod(slot, 64)
        self._live[word] &= ~(1 << bit)
        if any(owned):
            self._removed.append(slot)
            self.on_work()
        else:
            heapq.heappush(self._free, slot)

    def clean(self, num_positions: int = CLEAN_LEN) -> bool:
        """One slice of what is to be done. True if more remains."""
        self._ahead.clear()
        if self._next is not None or self._old is not None:
            self._go_on_growing(max(1, num_positions // _SWEEP_SPEED))
        elif self._sweeping or self._removed:
            self._sweep(num_positions)
        return bool(self._next or self._old or self._sweeping or self._removed)

    def add(self, slot: int, ids: Iterable[int], tier: int = 0) -> None:
        """The slot's worker holds `ids`, beside what it held. Raises KeyError for a bad slot.

        An id 0 is ignored: it stands for none.
        """
        self._ahead.clear()
        num_owned = self._num_owned[slot]
        plane, bit = self._place_of(slot, tier)
        new = list(ids)
        for start in range(0, len(new), SLICE_LEN):
            some = new[start : start + SLICE_LEN]
            if len(some) < _MANY:
                num_owned[tier] += sum(self._add_one(block, plane, bit) for block in some)
            else:
                num_owned[tier] += self._add_many(some, plane, bit)

    def remove(self, slot: int, ids: Iterable[int], tier: int = 0) -> None:
        """The slot's worker holds `ids` no more; ids that it did not hold are ignored."""
        self._ahead.clear()
        num_owned = self._num_owned[slot]
        plane, bit = self._place_of(slot, tier)
        old = list(ids)
        for start in range(0, len(old), SLICE_LEN):
            some = old[start : start + SLICE_LEN]
            if len(some) < _MANY:
                num_owned[tier] -= sum(self._remove_one(block, plane, bit) for block in some)
            else:
                num_owned[tier] -= self._remove_many(some, plane, bit)

    def owned(self, slot: int, tier: int = 0) -> set[int]:
        """All that the slot's worker holds in the tier. For checks: it reads the whole index."""
        if not self.num_owned(slot, tier):
            return set()
        plane, bit = self._place_of(slot, tier)
        found = self._table.holders(plane, bit)
        if self._old is not None:
            found |= self._old.holders(plane, bit)
        wide = bit << (64 * plane)
        return found | {block for block, masks in self._stash.items() if masks & wide}

    def num_owned(self, slot: int, tier: int = 0) -> int:
        """How many blocks the slot's worker holds in the tier."""
        counts = self._num_owned[slot]
        return counts[tier] if tier < len(counts) else 0

    def look_ahead(self, prompts: Sequence[Ids]) -> None:
        """These very arrays will be asked about next: finding all ids at once takes a third.

        It lasts until the index changes or other prompts are looked up so.
        """
        self._ahead.clear()
        found, all_found = self._table.find_all(np.concatenate(prompts))
        end = 0
        for prompt in prompts:
            start, end = end, end + len(prompt)
            self._ahead[id(prompt)] = (prompt, found[start:end], all_found)

    def overlaps(self, ids: Ids | Sequence[int]) -> dict[int, int]:
        """For each slot that holds the first block: how many leading blocks of `ids` it holds.

        In the fastest tier alone.
        """
        return self._reaches(ids, 1)[0]

    def reaches(self, ids: Ids | Sequence[int]) -> list[dict[int, int]]:
        """For each tier what `overlaps` says of it and all faster ones together."""
        return self._reaches(ids, len(self._planes))

    def _reaches(self, ids: Ids | Sequence[int], num_tiers: int) -> list[dict[int, int]]:
        reaches: list[dict[int, int]] = [{} for _ in range(num_tiers)]
        ahead = self._ahead.pop(id(ids), None)
        # Most prompts that nobody knows end here.
        if ahead is None and (not len(ids) or not self._knows(int(ids[0]))):
            return reaches
        prompt = np.asarray(ids, np.uint64)
        if ahead is None:
            found, is_complete = self._table.find_all(prompt)
        else:
            _, found, is_complete = ahead
        walk = Walk((self._table, found), is_complete, self._old, self._stash, prompt)
        if not walk.length:
            return reaches
        for word, live in enumerate(self._live):
            masks: Ids | None = None
            for reach, planes in zip(reaches, self._planes, strict=False):
                if live and word < len(planes):
                    more = walk.masks(planes[word])
                    masks = more if masks is None else masks | more
                if masks is not None:
                    count_leading(masks, live, 64 * word, reach)
        return reaches

    def _place_of(self, slot: int, tier: int) -> tuple[int, int]:
        """The plane and the bit in it."""
        word, bit = divmod(slot, 64)
        while tier >= len(self._planes):
            self._planes.append([])
            for counts in self._num_owned.values():
                counts.append(0)
        planes = self._planes[tier]
        while word >= len(planes):
            planes.append(len(self._table.planes))
            self._table.add_plane()
            for other in filter(None, (self._next, self._old)):
                other.add_plane()
        return planes[word], 1 << bit

    def _masks(self, block: int) -> int:
        """All bits of the id, removed workers' too."""
        position = self._table.find(block)
        if position >= 0:
            return self._table.masks(position)
        if self._old is not None:
            position = self._old.find(block)
            if position >= 0:
                return self._old.masks(position)
        return self._stash.get(block, 0)

    def _knows(self, block: int) -> bool:
        """Whether the id is anywhere, perhaps with removed workers' bits alone."""
        if self._table.find(block) >= 0 or block in self._stash:
            return True
        return self._old is not None and self._old.find(block) >= 0

    def _set_masks(self, block: int, masks: int) -> None:
        """Change the bits of an id that is known; without any it is forgotten."""
        for table in filter(None, (self._table, self._old)):
            position = table.find(block)
            if position >= 0:
                table.set_masks(position, masks)
                if not masks:
                    table.erase(position)
                    self._num_placed -= 1
                return
        if masks:
            self._stash[block] = masks
        else:
            del self._stash[block]

    def _add_one(self, block: int, plane: int, bit: int) -> int:
        """Set a bit of an id. Returns how many were not set already: 1 or 0."""
        if not block:
            return 0
        wide = bit << (64 * plane)
        masks = self._masks(block)
        if masks & wide:
            return 0
        if masks:
            self._set_masks(block, masks | wide)
            return 1
        position = self._table.place(block)
        if position < 0:
            self._stash[block] = wide
        else:
            self._table.views[plane][position] = bit
            self._num_placed += 1
        self._go_on_growing(1)
        return 1

    def _add_many(self, blocks: list[int], plane: int, bit: int) -> int:
        """`_add_one` for each of `blocks`."""
        ids: Ids = np.unique(np.array(blocks, np.uint64))
        found, _ = self._table.find_all(ids)
        # The empty position found for an id 0 must stay without a bit.
        known = (found >= 0) & (ids != 0)
        bits = self._table.planes[plane]
        at = found[known]
        num_new = int(np.count_nonzero((bits.take(at) & np.uint64(bit)) == 0))
        bits[at] |= np.uint64(bit)
        unknown = ids[~known & (ids != 0)]
        if self._old is not None or self._stash:
            elsewhere = self._are_elsewhere(unknown)
            num_new += sum(self._add_one(b, plane, bit) for b in unknown[elsewhere].tolist())
            unknown = unknown[~elsewhere]
        if len(unknown):
            masks = np.full(len(unknown), bit, np.uint64)
            self._insert(unknown, {plane: masks})
            self._go_on_growing(len(unknown))
        return num_new + len(unknown)

    def _remove_one(self, block: int, plane: int, bit: int) -> int:
        """Clear a bit of an id. Returns how many were set: 1 or 0."""
        wide = bit << (64 * plane)
        masks = self._masks(block)
        if not masks & wide:
            return 0
        self._set_masks(block, masks & ~wide)
        return 1

    def _remove_many(self, blocks: list[int], plane: int, bit: int) -> int:
        """`_remove_one` for each of `blocks`."""
        ids: Ids = np.unique(np.array(blocks, np.uint64))
        found, _ = self._table.find_all(ids)
        at = found[(found >= 0) & (ids != 0)]
        table = self._table
        bits = table.planes[plane]
        at = at[(bits.take(at) & np.uint64(bit)) != 0]
        bits[at] &= np.uint64(_ALL ^ bit)
        rest = table.planes[0].take(at)
        for other in table.planes[1:]:
            rest |= other.take(at)
        empty = at[rest == 0]
        table.keys[empty] = 0
        self._num_placed -= len(empty)
        if self._old is None and not self._stash:
            return len(at)
        elsewhere = ids[(found < 0) & (ids != 0)].tolist()
        return len(at) + sum(self._remove_one(block, plane, bit) for block in elsewhere)

    def _are_elsewhere(self, ids: Ids) -> NDArray[np.bool_]:
        """Which of the ids are in the old table or in the stash."""
        stash = self._stash
        are = np.fromiter((block in stash for block in ids.tolist()), np.bool_, len(ids))
        if self._old is not None:
            are |= self._old.find_all(ids)[0] >= 0
        return are

    def _insert(self, ids: Ids, masks: dict[int, Ids]) -> None:
        """Take in ids that are nowhere yet, with their masks by plane."""
        placed = self._table.place_all(ids)
        settled = placed >= 0
        at = placed[settled]
        self._num_placed += len(at)
        for plane, bits in masks.items():
            self._table.planes[plane][at] = bits[settled]
        for number in (~settled).nonzero()[0].tolist():
            self._stash[int(ids[number])] = sum(
                int(bits[number]) << (64 * plane) for plane, bits in masks.items()
            )

    def _go_on_growing(self, num_positions: int) -> None:
        """As fast as ids are added, so that the larger table is there when it is needed."""
        if self._old is not None:
            self._move(16 * num_positions)
        elif self._next is not None:
            self._prepare(32 * num_positions)
        elif len(self) > self._table.capacity * 3 // 8:
            log_capacity = self._table.capacity.bit_length()
            self._next = BlockTable(log_capacity, len(self._table.planes))
            self._touched = 0
            self.on_work()

    def _prepare(self, num_positions: int) -> None:
        """Touch some of the next table's memory; when all is there, begin to move."""
        table = self._next
        assert table is not None
        end = min(self._touched + num_positions, table.capacity)
        table.touch(self._touched, end)
        self._touched = end
        if end == table.capacity:
            self._old, self._moved = self._table, 0
            self._table, self._next = table, None
            # What was swept is swept again.
            self._swept, self._stash_left = 0, []

    def _move(self, num_positions: int) -> None:
        """Move some ids from the old table, without the bits of removed workers."""
        old = self._old
        assert old is not None
        start, end = self._moved, min(self._moved + num_positions, old.capacity)
        self._num_placed -= old.retain(start, end, self._kept())
        at = old.keys[start:end].nonzero()[0] + start
        if len(at):
            ids = old.keys[at]
            masks = {plane: bits[at] for plane, bits in enumerate(old.planes)}
            old.keys[start:end] = 0
            for bits in old.planes:
                bits[start:end] = 0
            self._num_placed -= len(at)
            self._insert(ids, masks)
        self._moved = end
        if end == old.capacity:
            self._old = None

    def _sweep(self, num_positions: int) -> None:
        """Take removed workers' bits out: of the table, then of the stash."""
        if not self._sweeping:
            self._sweeping, self._removed = list(self._removed), deque()
            self._swept = 0
        table = self._table
        if self._swept < table.capacity:
            end = min(self._swept + num_positions, table.capacity)
            self._num_placed -= table.retain(self._swept, end, self._kept())
            self._swept = end
            if end == table.capacity:
                self._stash_left = list(self._stash)
        else:
            live = sum(bits << (64 * plane) for plane, bits in enumerate(self._kept()))
            for _ in range(min(len(self._stash_left), max(1, num_positions // _SWEEP_SPEED))):
                block = self._stash_left.pop()
                if block in self._stash:
                    self._set_masks(block, self._stash[block] & live)
        if self._swept == table.capacity and not self._stash_left:
            for slot in self._sweeping:
                heapq.heappush(self._free, slot)
            self._sweeping = []

    def _kept(self) -> list[int]:
        """By plane: the bits that are a worker's."""
        kept = [0] * len(self._table.planes)
        for planes in self._planes:
            for plane, live in zip(planes, self._live, strict=False):
                kept[plane] = live
        return kept
