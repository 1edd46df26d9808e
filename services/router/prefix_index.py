"""Who holds which block: a dict from short block id to a bitmask of workers.

A worker has a slot, a bit of the mask. `overlaps` walks a prompt's ids once and
finds for all workers together how many leading blocks each holds: the masks of
the ids so far are ANDed, and a worker's count is where its bit falls out.

    bit of a slot in `_live`      the slot's worker counts
    bit in a mask, not in `_live` left by a removed worker; `clean` takes it out
    slot in `_free`               its bit is in no mask: it may be given again

So a worker is out of all answers at once when it is removed, whatever it held,
and the cleaning comes after in slices. Plain memory: no clock, no I/O, no
knowledge of what a worker or a block is.

Cost per known block: a dict entry with its key, and for each worker that holds
it an entry of that worker's set.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Ids that one slice of cleaning or loading handles: well below a millisecond.
SLICE_LEN = 1024
_MAX_SHARED_MASKS = 8192


class PrefixIndex:
    """Ownership of blocks by slots. Not thread-safe."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._shared_masks: dict[int, int] = {}
        self._owned: dict[int, set[int]] = {}
        self._live = 0
        self._removed: deque[tuple[int, set[int]]] = deque()
        self._free: list[int] = []
        self._num_slots = 0

    def __len__(self) -> int:
        """Distinct block ids known, those of removed workers not yet cleaned included."""
        return len(self._masks)

    def add_worker(self) -> int:
        """A slot for a new worker, which owns nothing yet."""
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._num_slots
            self._num_slots += 1
        self._owned[slot] = set()
        self._live |= 1 << slot
        return slot

    def remove_worker(self, slot: int) -> None:
        """The worker counts no more, from now on. Raises KeyError for a slot not given."""
        owned = self._owned.pop(slot)
        self._live &= ~(1 << slot)
        self._removed.append((slot, owned))

    def clean(self, max_ids: int = SLICE_LEN) -> bool:
        """Take removed workers' bits out of at most `max_ids` masks. True if more remain."""
        while self._removed and max_ids > 0:
            slot, owned = self._removed[0]
            for _ in range(min(max_ids, len(owned))):
                self._clear(owned.pop(), slot)
                max_ids -= 1
            if not owned:
                self._removed.popleft()
                self._free.append(slot)
        return bool(self._removed)

    def add(self, slot: int, ids: Iterable[int]) -> None:
        """The slot's worker holds `ids`, beside what it held. Raises KeyError for a bad slot."""
        owned = self._owned[slot]
        masks = self._masks
        bit = self._shared(1 << slot)
        for block in ids:
            mask = masks.get(block)
            masks[block] = bit if mask is None else self._shared(mask | bit)
            owned.add(block)

    def remove(self, slot: int, ids: Iterable[int]) -> None:
        """The slot's worker holds `ids` no more; ids that it did not hold are ignored."""
        owned = self._owned[slot]
        for block in ids:
            if block in owned:
                owned.discard(block)
                self._clear(block, slot)

    def owned(self, slot: int) -> set[int]:
        """All that the slot's worker holds: the index's own set, not to be changed."""
        return self._owned[slot]

    def num_owned(self, slot: int) -> int:
        """How many blocks the slot's worker holds."""
        return len(self._owned[slot])

    def overlaps(self, ids: Iterable[int]) -> dict[int, int]:
        """For each slot that holds the first block: how many leading blocks of `ids` it holds."""
        alive = self._live
        lost: list[tuple[int, int]] = []
        last: int | None = -1
        # The None after the last id ends every worker that is still alive, as a miss does.
        for depth, mask in enumerate(chain(map(self._masks.get, ids), (None,))):
            # Neighbours mostly share one int object.
            if mask is last:
                continue
            kept = alive & mask if mask else 0
            if kept != alive:
                lost.append((depth, alive ^ kept))
                alive = kept
            if not alive:
                break
            last = mask
        counts: dict[int, int] = {}
        for count, slots in lost:
            while count and slots:
                lowest = slots & -slots
                counts[lowest.bit_length() - 1] = count
                slots ^= lowest
        return counts

    def _clear(self, block: int, slot: int) -> None:
        mask = self._masks[block] & ~(1 << slot)
        if mask:
            self._masks[block] = self._shared(mask)
        else:
            del self._masks[block]

    def _shared(self, mask: int) -> int:
        """One int object for equal masks, as far as remembered: less memory, faster walks."""
        if len(self._shared_masks) >= _MAX_SHARED_MASKS:
            self._shared_masks.clear()
        return self._shared_masks.setdefault(mask, mask)
