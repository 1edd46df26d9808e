"""KV blocks that fell out of the device: which lie in which slower tier, and where.

    device ──evicted──▶ host ──evicted──▶ disk ──evicted──▶ gone
       ▲                  │                 │
       └──────brought─────┴─────────────────┘

Each tier is an LRU of ids in numbered slots, the tiers numbered from 1 (0 is the
device). An id lies in one tier at most: what is brought back, or computed anew on the
device, leaves the slower one. What has to be copied for that is told as *moves*, to be
made in their order before anything else is written. Pure: no tensors, no bytes, no
clock, no idea of who asks.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from headrace.blocks import short_id, short_ids
from services.worker.plan import DEVICE, Move

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from headrace.blocks import BlockId


class _Tier:
    """One tier of `num_blocks` slots, each of which is in `free`, or an id's, or held."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))
        #: Least recently used first.
        self.slots: OrderedDict[BlockId, int] = OrderedDict()
        #: Net changes since they were last taken: id -> now here or not.
        self.changes: dict[BlockId, bool] = {}

    def put(self, block_id: BlockId, slot: int) -> None:
        self.slots[block_id] = slot
        if self.changes.pop(block_id, True):
            self.changes[block_id] = True

    def take(self, block_id: BlockId) -> int:
        if not self.changes.pop(block_id, False):
            self.changes[block_id] = False
        return self.slots.pop(block_id)


class SlowerTiers:
    """Tiers of `sizes` slots, the fastest first. Not thread-safe."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._tiers = [_Tier(size) for size in sizes]
        self._moves: list[Move] = []
        #: Held ids: tier and slot.
        self._held: dict[BlockId, tuple[int, int]] = {}

    def __contains__(self, block_id: BlockId) -> bool:
        return any(block_id in tier.slots for tier in self._tiers)

    def fall(self, block_id: BlockId, block: int) -> None:
        """The device evicts its `block`: keep the id in the fastest tier that has room or
        something to push out, which falls in turn."""
        self._fall(block_id, DEVICE, block)

    def hold(self, block_id: BlockId) -> bool:
        """Take the id out, but leave its slot alone until `bring`. False if it is not here."""
        for number, tier in enumerate(self._tiers, 1):
            if block_id in tier.slots:
                self._held[block_id] = number, tier.take(block_id)
                return True
        return False

    def bring(self, block_id: BlockId, block: int) -> None:
        """Copy a held id to this device block; its slot is free. Raises KeyError."""
        number, slot = self._held.pop(block_id)
        self._moves.append(Move(number, slot, DEVICE, block))
        self._tiers[number - 1].free.append(slot)

    def drop(self, block_id: BlockId) -> None:
        """The device holds the id by itself."""
        for tier in self._tiers:
            if block_id in tier.slots:
                tier.free.append(tier.take(block_id))
                return

    def take_moves(self) -> list[Move]:
        """What is to be copied since the last call, in order."""
        moves, self._moves = self._moves, []
        return moves

    def take_changes(self) -> list[tuple[list[int], list[int]]]:
        """By tier, short ids (stored, removed) whose net state changed since the last call."""
        found = []
        for tier in self._tiers:
            changes, tier.changes = tier.changes, {}
            stored = b"".join([block_id for block_id, here in changes.items() if here])
            removed = b"".join([block_id for block_id, here in changes.items() if not here])
            found.append((short_ids(stored), short_ids(removed)))
        return found

    def owned(self) -> list[list[int]]:
        """By tier, short ids of all that lie there."""
        return [[short_id(block_id) for block_id in tier.slots] for tier in self._tiers]

    def check(self, on_device: Iterable[BlockId]) -> None:
        """Raise AssertionError if a slot is lost or used twice, or an id is in two tiers."""
        seen = set(on_device)
        assert not self._held
        for tier in self._tiers:
            assert sorted([*tier.free, *tier.slots.values()]) == list(range(tier.num_blocks))
            assert not seen & tier.slots.keys()
            seen |= tier.slots.keys()

    def _fall(self, block_id: BlockId, source: int, block: int) -> None:
        for number, tier in enumerate(self._tiers[source:], source + 1):
            if tier.free:
                slot = tier.free.pop()
            elif tier.slots:
                oldest = next(iter(tier.slots))
                slot = tier.take(oldest)
                self._fall(oldest, number, slot)
            else:
                # All its slots are held.
                continue
            tier.put(block_id, slot)
            self._moves.append(Move(source, block, number, slot))
            return
