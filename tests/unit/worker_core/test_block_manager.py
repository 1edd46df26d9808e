"""The block manager: sharing, eviction order, changes, and faults of its users."""

from __future__ import annotations

import pytest

from headrace.blocks import short_id
from services.worker.kv import BlockManager


def ids(count: int) -> list[bytes]:
    return [bytes([number + 1]) * 16 for number in range(count)]


def short(*block_ids: bytes) -> list[int]:
    return [short_id(block_id) for block_id in block_ids]


def found(blocks: BlockManager, block_ids: list[bytes]) -> list[int]:
    count, (table,) = blocks.find_prefix(block_ids)
    assert count == len(table)
    return table


def cached(blocks: BlockManager, block_ids: list[bytes]) -> list[int]:
    """Compute and release a sequence of full blocks."""
    taken = blocks.allocate(len(block_ids))
    for block, block_id in zip(taken, block_ids, strict=True):
        blocks.register([block], [block_id])
    blocks.release(taken)
    return taken


def test_released_blocks_stay_cached_and_are_shared_without_copy() -> None:
    blocks = BlockManager(4)
    names = ids(3)
    taken = cached(blocks, names)
    assert found(blocks, names) == taken
    assert found(blocks, [names[0], bytes(16), names[2]]) == taken[:1]
    assert (blocks.num_used, blocks.num_available) == (0, 4)

    blocks.share(taken)
    blocks.share(taken[:1])
    assert (blocks.num_used, blocks.num_available) == (3, 1)
    assert blocks.num_exclusive(taken) == 2
    blocks.check([taken, taken[:1]])


def test_the_least_recently_used_goes_first_and_a_prefix_outlives_its_tail() -> None:
    blocks = BlockManager(4)
    old, new = ids(4)[:2], ids(4)[2:]
    cached(blocks, old)
    cached(blocks, new)
    blocks.share(old_blocks := found(blocks, old))
    blocks.release(old_blocks)
    blocks.allocate(1)
    assert found(blocks, new) == found(blocks, new[:1]) != []
    blocks.allocate(2)
    assert found(blocks, new) == []
    assert found(blocks, old) == old_blocks[:1]


def test_used_blocks_are_never_evicted() -> None:
    blocks = BlockManager(3)
    names = ids(3)
    taken = cached(blocks, names)
    blocks.share(taken[:2])
    with pytest.raises(ValueError, match="2 blocks were asked of 1"):
        blocks.allocate(2)
    assert blocks.allocate(1) == [taken[2]]
    assert found(blocks, names) == taken[:2]


def test_of_two_blocks_with_one_id_the_first_stays() -> None:
    blocks = BlockManager(2)
    (name,) = ids(1)
    first, second = blocks.allocate(2)
    blocks.register([first], [name])
    blocks.register([second], [name])
    assert blocks.take_changes() == (short(name), [])
    blocks.release([second])
    assert found(blocks, [name]) == [first]
    blocks.check([[first]])


def test_changes_are_net() -> None:
    blocks = BlockManager(2)
    names = ids(4)
    cached(blocks, names[:2])
    assert blocks.take_changes() == (short(*names[:2]), [])
    assert blocks.take_changes() == ([], [])
    # Stored and removed again, removed and stored again: both are nothing.
    cached(blocks, names[2:])
    cached(blocks, names[:2])
    assert blocks.take_changes() == ([], [])
    assert sorted(blocks.owned()) == sorted(short(*names[:2]))


def test_a_double_free_is_an_error() -> None:
    blocks = BlockManager(2)
    taken = blocks.allocate(1)
    blocks.release(taken)
    with pytest.raises(ValueError, match="freed twice"):
        blocks.release(taken)


def test_check_finds_a_lost_block() -> None:
    blocks = BlockManager(2)
    taken = blocks.allocate(2)
    with pytest.raises(AssertionError):
        blocks.check([taken[:1]])
