"""Slower tiers: falling, being found again, and what is copied for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.blocks import short_id
from headrace.errors import StartupError
from services.worker.engines.sim.tiers import tiers
from services.worker.kv import TieredBlockManager
from services.worker.plan import DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable


def ids(*numbers: int) -> list[bytes]:
    return [number.to_bytes(8, "little") + bytes(8) for number in numbers]


class Content:
    """What lies where, by the moves alone."""

    def __init__(self, manager: TieredBlockManager, num_tiers: int) -> None:
        self.manager = manager
        self.tiers: list[dict[int, bytes]] = [{} for _ in range(num_tiers)]

    def copy(self) -> None:
        for tier, source, target_tier, target in self.manager.take_moves():
            self.tiers[target_tier][target] = self.tiers[tier][source]

    def compute(self, block_ids: list[bytes]) -> list[int]:
        """A sequence of these blocks: what is found is taken, the rest computed."""
        count, _ = self.manager.look(block_ids)
        ((table,),) = self.manager.take_prefixes([block_ids[:count]])
        table = table + self.manager.allocate(len(block_ids) - count)
        self.copy()
        for block, block_id in zip(table[:count], block_ids, strict=False):
            assert self.tiers[DEVICE][block] == block_id
        for block, block_id in zip(table[count:], block_ids[count:], strict=True):
            self.tiers[DEVICE][block] = block_id
        self.manager.register(table[count:], block_ids[count:])
        return table


def test_what_is_evicted_falls_and_comes_back() -> None:
    manager = TieredBlockManager(2, [2, 1])
    content = Content(manager, 3)
    for first in (1, 3, 5):
        manager.release(content.compute(ids(first, first + 1)))
    # 5 and 6 on the device; 3 and 4 pushed 1 and 2 out of the host, of which one fits the disk.
    assert sorted(manager.owned()) == [5, 6]
    assert [sorted(tier) for tier in manager.owned_slower()] == [[3, 4], [1]]
    assert manager.look(ids(1, 3)) == (2, 2)
    assert manager.look(ids(2)) == (0, 0)

    manager.release(content.compute(ids(1, 3)))
    assert sorted(manager.owned()) == [1, 3]
    # 4 had to make room before 1 had left the disk.
    assert [sorted(tier) for tier in manager.owned_slower()] == [[5], [6]]
    manager.check([])


def test_two_sequences_share_what_one_brought() -> None:
    manager = TieredBlockManager(3, [3])
    content = Content(manager, 2)
    manager.release(content.compute(ids(1)))
    manager.release(content.compute(ids(2, 3, 4)))
    one, other = manager.take_prefixes([ids(1), ids(1)])
    assert one == other
    assert [move.target_tier for move in manager.take_moves()] == [1, DEVICE]
    manager.check([one[0], other[0]])
    assert manager.num_used == 1


def test_changes_are_net_and_by_tier() -> None:
    manager = TieredBlockManager(1, [1])
    content = Content(manager, 2)
    manager.release(content.compute(ids(1)))
    manager.take_changes()
    manager.release(content.compute(ids(2)))
    assert manager.take_changes() == ([2], [1])
    assert manager.take_slower_changes() == [([1], [])]
    manager.release(content.compute(ids(1)))
    manager.release(content.compute(ids(2)))
    assert manager.take_changes() == ([], [])
    assert manager.take_slower_changes() == [([], [])]


def test_what_is_computed_anew_leaves_the_slower_tier() -> None:
    manager = TieredBlockManager(2, [2])
    content = Content(manager, 2)
    manager.release(content.compute(ids(1, 2)))
    manager.release(content.compute(ids(3)))
    manager.release(content.compute(ids(4)))
    assert sorted(manager.owned_slower()[0]) == [1, 2]
    # Behind a block that nobody has, 2 can't be used.
    manager.release(content.compute(ids(5, 2)))
    assert 2 in manager.owned()
    assert 2 not in manager.owned_slower()[0]
    manager.check([])


PREFIXES = st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True)


@settings(max_examples=300, deadline=None)
@given(
    num_blocks=st.integers(4, 8),
    sizes=st.sampled_from([(1,), (4,), (2, 3), (1, 1), (20, 20)]),
    sequences=st.lists(st.tuples(PREFIXES, st.booleans()), max_size=30),
)
def test_nothing_is_lost_or_in_two_tiers(
    num_blocks: int, sizes: tuple[int, ...], sequences: list[tuple[list[int], bool]]
) -> None:
    manager = TieredBlockManager(num_blocks, sizes)
    content = Content(manager, 1 + len(sizes))
    kept: list[int] = []
    owned: list[set[int]] = [set() for _ in range(1 + len(sizes))]
    for numbers, keep in sequences:
        table = content.compute(ids(*numbers))
        manager.check([table, kept])
        if keep:
            table, kept = kept, table
        manager.release(table)
        if not keep or manager.num_available < 4:
            manager.release(kept)
            kept = []
        manager.check([kept])
        changes = [manager.take_changes(), *manager.take_slower_changes()]
        for tier, (stored, removed) in enumerate(changes):
            assert not owned[tier] & set(stored)
            assert owned[tier] >= set(removed)
            owned[tier] = (owned[tier] - set(removed)) | set(stored)
        assert owned == [set(manager.owned()), *map(set, manager.owned_slower())]
        for tier, block_ids in enumerate(manager.owned_slower(), 1):
            assert {short_id(block) for block in content.tiers[tier].values()} >= set(block_ids)


def test_bringing_takes_its_time_and_no_computing(tiny: Callable[..., Any]) -> None:
    """In the core, with outputs checked: a step waits for what it brings."""
    engine = tiny(
        num_blocks=4, block_size=2, max_step_tokens=8, tier_blocks=(8,), tier_ms=(0.0, 7.0)
    )
    prompt = [0, 1, 2, 3, 0]
    engine.run(prompt, 1)
    engine.run([3, 3, 3, 3, 3, 3, 3], 1)
    began = engine.clock.now()
    end = engine.run(prompt, 1)
    assert end.cached_tokens == 4
    moves = [move for plan in engine.plans for move in plan.moves if move.target_tier == DEVICE]
    took_ms = (engine.clock.now() - began) * 1000
    # A step is 10 ms if it decodes, as computing a single token does.
    assert took_ms == pytest.approx(len(moves) * 7.0 + 10.0)
    assert moves
    # What bringing took is not what computing takes.
    assert engine.core.stats().step_ms == pytest.approx(engine.clock.now() * 1000 - len(moves) * 7)


@pytest.mark.parametrize(
    ("host", "disk", "message"),
    [((-1, 1.0), (0, 1.0), "host blocks"), ((1, 1.0), (1, float("nan")), "disk GB/s")],
)
def test_tiers_that_can_not_be(
    host: tuple[int, float], disk: tuple[int, float], message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        tiers(1024, host=host, disk=disk)


def test_bandwidth_is_time_per_block() -> None:
    found = tiers(64 * 131_072, host=(10, 50.0), disk=(0, 6.0))
    assert found.names == ("device", "host")
    assert found.ms_per_block == pytest.approx((0.0, 0.1678), abs=1e-4)
