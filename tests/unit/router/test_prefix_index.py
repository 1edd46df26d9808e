"""The index against a plain model: sets of ids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.router import block_table
from services.router.prefix_index import PrefixIndex

#: Few, so that workers share blocks and blocks come back; enough for tables to grow.
IDS = st.integers(1, 60)
#: Short ones are handled one by one, long ones together.
LISTS = st.one_of(st.lists(IDS, max_size=6), st.lists(st.integers(0, 200), min_size=24))
TIERS = st.integers(0, 2)


class AgainstSets(RuleBasedStateMachine):
    """Random lives of workers; after each step every answer equals the model's."""

    @initialize(before=st.sampled_from([0, 60]))
    def begin(self, before: int) -> None:
        self.index = PrefixIndex(log_capacity=3)
        # Slots in two words.
        for _ in range(before):
            self.index.add_worker()
        self.model: dict[int, list[set[int]]] = {}

    def slot(self, data: st.DataObject) -> int | None:
        return data.draw(st.sampled_from(sorted(self.model))) if self.model else None

    @rule()
    def add_worker(self) -> None:
        slot = self.index.add_worker()
        assert slot not in self.model
        self.model[slot] = [set(), set(), set()]

    @rule(data=st.data())
    def remove_worker(self, data: st.DataObject) -> None:
        slot = self.slot(data)
        if slot is not None:
            self.index.remove_worker(slot)
            del self.model[slot]

    @rule(data=st.data(), ids=LISTS, tier=TIERS)
    def add(self, data: st.DataObject, ids: list[int], tier: int) -> None:
        slot = self.slot(data)
        if slot is not None:
            self.index.add(slot, ids, tier)
            self.model[slot][tier] |= set(ids) - {0}

    @rule(data=st.data(), ids=LISTS, tier=TIERS)
    def remove(self, data: st.DataObject, ids: list[int], tier: int) -> None:
        slot = self.slot(data)
        if slot is not None:
            self.index.remove(slot, ids, tier)
            self.model[slot][tier] -= set(ids)

    @rule(num_positions=st.integers(1, 40))
    def clean(self, num_positions: int) -> None:
        self.index.clean(num_positions)

    @rule()
    def clean_all(self) -> None:
        while self.index.clean(30):
            pass
        owned = [ids for tiers in self.model.values() for ids in tiers]
        assert len(self.index) == len(set().union(*owned))

    @rule(prompt=st.one_of(st.lists(IDS, max_size=12), st.lists(st.integers(0, 200))))
    def overlaps(self, prompt: list[int]) -> None:
        reaches = self.index.reaches(prompt)
        for tier, reach in enumerate(reaches):
            assert reach == self.expected(prompt, tier)
        assert self.index.overlaps(prompt) == reaches[0]

    @rule(data=st.data(), num_ids=st.integers(1, 300), other=IDS)
    def a_long_prefix(self, data: st.DataObject, num_ids: int, other: int) -> None:
        prompt = [*range(1, num_ids + 1), other]
        slot = self.slot(data)
        if slot is not None:
            self.index.add(slot, prompt[: num_ids // 2])
            self.model[slot][0] |= set(prompt[: num_ids // 2])
        self.overlaps(prompt)

    def expected(self, prompt: list[int], tier: int) -> dict[int, int]:
        expected = {}
        for slot, tiers in self.model.items():
            owned = set().union(*tiers[: tier + 1])
            count = 0
            while count < len(prompt) and prompt[count] in owned:
                count += 1
            if count:
                expected[slot] = count
        return expected

    @rule(prompts=st.lists(LISTS, min_size=1, max_size=4), changes=LISTS, data=st.data())
    def look_ahead(self, prompts: list[list[int]], changes: list[int], data: st.DataObject) -> None:
        """Answers are those without it, whatever happens between."""
        arrays = [np.array(prompt, np.uint64) for prompt in prompts]
        expected = [self.index.reaches(prompt) for prompt in prompts]
        self.index.look_ahead(arrays)
        assert [self.index.reaches(array) for array in arrays] == expected
        slot = self.slot(data)
        self.index.look_ahead(arrays)
        if slot is not None:
            self.index.add(slot, changes)
            self.model[slot][0] |= {block for block in changes if block}
        self.index.clean(8)
        assert [self.index.reaches(array) for array in arrays] == [
            self.index.reaches(prompt) for prompt in prompts
        ]

    @invariant()
    def same_sets(self) -> None:
        for slot, tiers in self.model.items():
            for tier, owned in enumerate(tiers):
                assert self.index.num_owned(slot, tier) == len(owned)
                assert self.index.owned(slot, tier) == owned


TestAgainstSets = AgainstSets.TestCase
TestAgainstSets.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_removed_worker_is_out_at_once_and_its_slot_is_kept_until_it_is_clean() -> None:
    index = PrefixIndex()
    one, two = index.add_worker(), index.add_worker()
    index.add(one, range(1, 101))
    index.add(two, range(1, 51))
    index.remove_worker(one)
    assert index.overlaps(range(1, 101)) == {two: 50}
    assert index.clean(64)
    assert index.add_worker() not in (one, two)
    while index.clean(64):
        pass
    reused = index.add_worker()
    assert reused == one
    assert index.overlaps([1]) == {two: 1}


def test_slots_beyond_a_machine_word() -> None:
    index = PrefixIndex()
    slots = [index.add_worker() for _ in range(200)]
    for slot in slots:
        index.add(slot, range(1, slot + 2))
    assert index.overlaps(range(1, 500)) == {slot: slot + 1 for slot in slots}


def test_an_unknown_slot_is_refused() -> None:
    with pytest.raises(KeyError):
        PrefixIndex().add(0, [1])


def test_ids_that_crowd_a_bucket_are_all_found() -> None:
    """Ids with one home, as nobody outside could choose them: the hash's factor is secret."""
    inverse = pow(block_table._FACTOR, -1, 1 << 64)
    crowd = [number * inverse % (1 << 64) for number in range(1, 101)]
    index = PrefixIndex()
    one, two = index.add_worker(), index.add_worker()
    index.add(one, crowd)
    for block in crowd[:50]:
        index.add(two, [block])
    assert index.overlaps(crowd) == {one: 100, two: 50}
    index.remove(one, crowd[70:])
    assert index.overlaps(crowd) == {one: 70, two: 50}
    index.remove_worker(one)
    while index.clean(64):
        pass
    assert (len(index), index.owned(two)) == (50, set(crowd[:50]))


def test_growing_is_done_in_slices_and_changes_no_answer() -> None:
    index = PrefixIndex()
    called: list[bool] = []
    index.on_work = lambda: called.append(True)
    slots = [index.add_worker() for _ in range(3)]
    for block in range(1, 1501):
        index.add(slots[0], [block])
    index.add(slots[1], range(1, 1001))
    assert not called
    index.add(slots[2], range(1, 1601))
    assert called == [True]
    expected = {slots[0]: 1500, slots[1]: 1000, slots[2]: 1600}
    steps = 0
    while index.clean(256):
        steps += 1
        assert index.overlaps(range(1, 2000)) == expected
        assert len(index) == 1600
    assert steps > 20
    index.remove(slots[2], range(1400, 1601))
    assert index.overlaps(range(1, 2000)) == {slots[0]: 1500, slots[1]: 1000, slots[2]: 1399}
