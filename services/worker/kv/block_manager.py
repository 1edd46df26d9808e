"""Physical KV blocks by number: who uses them, and which full block holds which id.

It counts; it knows no tensors, no tokens and no sequences.

Every block is in exactly one of three states:

    free        no content worth keeping            in `_free`
    used        by one or more sequences            reference count > 0
    evictable   unused, its content still cached    in `_evictable`

A block that was registered has an id and stays cached, used or not, until its
room is needed; one id names at most one block of a group (see layout.py). Shared
blocks are full and never written again, so sharing needs no copy.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, TypeAlias

from headrace.blocks import short_id, short_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from headrace.blocks import BlockId
    from services.worker.plan import Move

#: A block id in group 0; (group, block id) in the others.
_Key: TypeAlias = "BlockId | tuple[int, BlockId]"


class BlockManager:
    """`num_blocks` blocks, numbered from 0. Not thread-safe.

    `reaches` has an entry for each group: how many full blocks before a position
    it needs there, None for all. Only group 0's blocks are told of in changes.
    """

    def __init__(self, num_blocks: int, reaches: Sequence[int | None] = (None,)) -> None:
        self.num_blocks = num_blocks
        self._reaches = tuple(reaches)
        self._is_simple = self._reaches == (None,)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_references = [0] * num_blocks
        #: What a cached block holds; None for a block that is not cached.
        self._key_of: list[_Key | None] = [None] * num_blocks
        self._cached: dict[_Key, int] = {}
        #: Least recently used first. (A dict's first key is slow to find once many before
        #: it were deleted.)
        self._evictable: OrderedDict[int, None] = OrderedDict()
        #: Net changes of group 0 since they were last taken: id -> now cached or not.
        self._changes: dict[BlockId, bool] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones and evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Blocks that sequences use."""
        return self.num_blocks - self.num_available

    def find_prefix(self, ids: Sequence[BlockId]) -> tuple[int, list[list[int]]]:
        """The longest prefix of `ids` from which a sequence can go on: how many blocks
        of tokens, and for each group the cached blocks that it needs of them, the
        last ones. Changes nothing."""
        cached = self._cached
        if self._is_simple:
            found = []
            for block_id in ids:
                block = cached.get(block_id)
                if block is None:
                    break
                found.append(block)
            return len(found), [found]
        count = self._longest(ids)
        firsts = [0 if reach is None else max(0, count - reach) for reach in self._reaches]
        return count, [
            [cached[_key(group, block_id)] for block_id in ids[first:count]]
            for group, first in enumerate(firsts)
        ]

    def _longest(self, ids: Sequence[BlockId]) -> int:
        """Blocks of the longest prefix whose end every group reaches back from."""
        longest, runs = 0, [0] * len(self._reaches)
        for count, block_id in enumerate(ids, 1):
            is_usable = True
            for group, reach in enumerate(self._reaches):
                if _key(group, block_id) in self._cached:
                    runs[group] += 1
                elif reach is None:
                    return longest
                else:
                    runs[group] = 0
                is_usable &= runs[group] >= (count if reach is None else min(count, reach))
            if is_usable:
                longest = count
        return longest

    def num_unused(self, blocks: Iterable[int]) -> int:
        """How many of cached `blocks` nobody uses: taking them lowers `num_available`."""
        return sum(block in self._evictable for block in blocks)

    def num_exclusive(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` have one user: its release raises `num_available`."""
        return sum(self._num_references[block] == 1 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add a user to cached `blocks`, as `find_prefix` gave them."""
        for block in blocks:
            self._num_references[block] += 1
            self._evictable.pop(block, None)

    def look(self, ids: Sequence[BlockId]) -> tuple[int, int]:
        """How many leading blocks of `ids` need no computing, and by how many physical
        ones taking them lowers `num_available`. Changes nothing."""
        count, tables = self.find_prefix(ids)
        return count, sum(self.num_unused(table) for table in tables)

    def take_prefixes(self, prefixes: Sequence[Sequence[BlockId]]) -> list[list[list[int]]]:
        """Add a user to each of `prefixes`, as long as `look` said; for each its tables by
        group, the last blocks of the prefix that the group needs."""
        taken = []
        for ids in prefixes:
            _, tables = self.find_prefix(ids)
            for table in tables:
                self.share(table)
            taken.append(tables)
        return taken

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks for one user, evicting the least recently used if it must.

        Raises ValueError, taking none, if there are fewer than `count` available.
        """
        if count > self.num_available:
            raise ValueError(f"{count} blocks were asked of {self.num_available}")
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._num_references[block] = 1
            taken.append(block)
        return taken

    def register(self, blocks: Iterable[int], ids: Iterable[BlockId], group: int = 0) -> None:
        """Cache used, full blocks under their ids. Of two blocks with one id the first stays."""
        cached, key_of, changes = self._cached, self._key_of, self._changes
        for block, block_id in zip(blocks, ids, strict=True):
            key = (group, block_id) if group else block_id
            if key in cached or key_of[block] is not None:
                continue
            cached[key] = block
            key_of[block] = key
            # A change and its opposite together are none.
            if not group and changes.pop(block_id, True):
                changes[block_id] = True

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a user of `blocks`, given in the sequence's order.

        Raises ValueError for a block without a user.
        """
        # From the end, so that a prefix outlives what hangs on it.
        for block in reversed(blocks):
            if self._num_references[block] < 1:
                raise ValueError(f"block {block} was freed twice")
            self._num_references[block] -= 1
            if self._num_references[block]:
                continue
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._evictable[block] = None

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Short ids (stored, removed) whose net state changed since the last call."""
        changes, self._changes = self._changes, {}
        stored = b"".join([block_id for block_id, cached in changes.items() if cached])
        removed = b"".join([block_id for block_id, cached in changes.items() if not cached])
        return short_ids(stored), short_ids(removed)

    def take_moves(self) -> list[Move]:
        """What is to be copied between tiers, in order, before the next step's work."""
        return []

    def take_slower_changes(self) -> list[tuple[list[int], list[int]]]:
        """By slower tier what `take_changes` says of the device."""
        return []

    def owned(self) -> list[int]:
        """Short ids of all cached blocks of group 0."""
        return [short_id(key) for key in self._cached if isinstance(key, bytes)]

    def owned_slower(self) -> list[list[int]]:
        """Short ids of all blocks in slower tiers, by tier."""
        return []

    def check(self, users: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError if an invariant at the top of this file is broken. For tests.

        `users` are the blocks of all users.
        """
        expected = Counter(block for blocks in users for block in blocks)
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free)
        for block, count in enumerate(self._num_references):
            is_cached = self._key_of[block] is not None
            assert count == expected[block]
            assert (count > 0) + (block in free) + (block in evictable) == 1
            assert count < 2 or is_cached
            assert block not in free or not is_cached
            assert block not in evictable or is_cached
        held = {key: block for block, key in enumerate(self._key_of) if key is not None}
        assert held == self._cached

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        key = self._key_of[block]
        assert key is not None
        self._key_of[block] = None
        del self._cached[key]
        if isinstance(key, bytes) and not self._changes.pop(key, False):
            self._changes[key] = False
        return block


def _key(group: int, block_id: BlockId) -> _Key:
    return (group, block_id) if group else block_id
