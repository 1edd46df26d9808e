"""A block manager whose evicted blocks fall into slower tiers and are found there again.

To the scheduler nothing differs: a prefix may go on in a slower tier, and taking what
lies there lowers the number of available blocks as taking unused ones does. It counts;
copies are made by who is handed the moves (see `slower_tiers`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.kv.block_manager import BlockManager
from services.worker.kv.slower_tiers import SlowerTiers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from headrace.blocks import BlockId
    from services.worker.plan import Move


class TieredBlockManager(BlockManager):
    """`num_blocks` on the device and `sizes` in slower tiers, of a model with one KV group."""

    def __init__(self, num_blocks: int, sizes: Sequence[int]) -> None:
        super().__init__(num_blocks)
        self._slower = SlowerTiers(sizes)

    def look(self, ids: Sequence[BlockId]) -> tuple[int, int]:
        """See BlockManager. What lies in slower tiers takes a block that nobody uses."""
        count = num_taken = 0
        for block_id in ids:
            block = self._cached.get(block_id)
            if block is None:
                if block_id not in self._slower:
                    break
                num_taken += 1
            else:
                num_taken += block in self._evictable
            count += 1
        return count, num_taken

    def take_prefixes(self, prefixes: Sequence[Sequence[BlockId]]) -> list[list[list[int]]]:
        """See BlockManager. What lies in slower tiers is brought to the device."""
        cached, slower = self._cached, self._slower
        held: list[BlockId] = []
        # All sharing and holding first: making room pushes out what nobody asked for.
        for ids in prefixes:
            for block_id in ids:
                block = cached.get(block_id)
                if block is not None:
                    self.share((block,))
                elif slower.hold(block_id):
                    held.append(block_id)
        if held:
            brought = set()
            # One by one: what makes room may fall to where the last one lay.
            for block_id in held:
                (block,) = self.allocate(1)
                slower.bring(block_id, block)
                self.register((block,), (block_id,))
                brought.add(block)
            self._share_brought(prefixes, brought)
        return [[[cached[block_id] for block_id in ids]] for ids in prefixes]

    def _share_brought(self, prefixes: Sequence[Sequence[BlockId]], unshared: set[int]) -> None:
        """Count the users of what was brought, beside the first ones."""
        brought = frozenset(unshared)
        for ids in prefixes:
            for block_id in ids:
                block = self._cached[block_id]
                if block in unshared:
                    unshared.remove(block)
                elif block in brought:
                    self.share((block,))

    def register(self, blocks: Iterable[int], ids: Iterable[BlockId], group: int = 0) -> None:
        """See BlockManager."""
        ids = list(ids)
        super().register(blocks, ids, group)
        for block_id in ids:
            self._slower.drop(block_id)

    def take_moves(self) -> list[Move]:
        """See BlockManager."""
        return self._slower.take_moves()

    def take_slower_changes(self) -> list[tuple[list[int], list[int]]]:
        """See BlockManager."""
        return self._slower.take_changes()

    def owned_slower(self) -> list[list[int]]:
        """See BlockManager."""
        return self._slower.owned()

    def check(self, users: Iterable[Sequence[int]]) -> None:
        """See BlockManager."""
        super().check(users)
        self._slower.check([key for key in self._cached if isinstance(key, bytes)])

    def _evict(self) -> int:
        key = self._key_of[next(iter(self._evictable))]
        block = super()._evict()
        assert isinstance(key, bytes)
        self._slower.fall(key, block)
        return block
