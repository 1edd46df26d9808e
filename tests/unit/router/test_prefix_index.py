"""The index against a plain model: sets of ids."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.router.prefix_index import PrefixIndex

#: Few, so that workers share blocks and blocks come back.
IDS = st.integers(1, 12)


class AgainstSets(RuleBasedStateMachine):
    """Random lives of workers; after each step every answer equals the model's."""

    @initialize()
    def begin(self) -> None:
        self.index = PrefixIndex()
        self.model: dict[int, set[int]] = {}

    def slot(self, data: st.DataObject) -> int | None:
        return data.draw(st.sampled_from(sorted(self.model))) if self.model else None

    @rule()
    def add_worker(self) -> None:
        slot = self.index.add_worker()
        assert slot not in self.model
        self.model[slot] = set()

    @rule(data=st.data())
    def remove_worker(self, data: st.DataObject) -> None:
        slot = self.slot(data)
        if slot is not None:
            self.index.remove_worker(slot)
            del self.model[slot]

    @rule(data=st.data(), ids=st.lists(IDS))
    def add(self, data: st.DataObject, ids: list[int]) -> None:
        slot = self.slot(data)
        if slot is not None:
            self.index.add(slot, ids)
            self.model[slot] |= set(ids)

    @rule(data=st.data(), ids=st.lists(IDS))
    def remove(self, data: st.DataObject, ids: list[int]) -> None:
        slot = self.slot(data)
        if slot is not None:
            self.index.remove(slot, ids)
            self.model[slot] -= set(ids)

    @rule(max_ids=st.integers(1, 5))
    def clean(self, max_ids: int) -> None:
        self.index.clean(max_ids)

    @rule()
    def clean_all(self) -> None:
        while self.index.clean(3):
            pass
        assert len(self.index) == len(set().union(*self.model.values()))

    @rule(prompt=st.lists(IDS, max_size=12))
    def overlaps(self, prompt: list[int]) -> None:
        expected = {}
        for slot, owned in self.model.items():
            count = 0
            while count < len(prompt) and prompt[count] in owned:
                count += 1
            if count:
                expected[slot] = count
        assert self.index.overlaps(prompt) == expected

    @invariant()
    def same_sets(self) -> None:
        for slot, owned in self.model.items():
            assert self.index.owned(slot) == owned
            assert self.index.num_owned(slot) == len(owned)


TestAgainstSets = AgainstSets.TestCase
TestAgainstSets.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_removed_worker_is_out_at_once_and_its_slot_is_kept_until_it_is_clean() -> None:
    index = PrefixIndex()
    one, two = index.add_worker(), index.add_worker()
    index.add(one, range(1, 101))
    index.add(two, range(1, 51))
    index.remove_worker(one)
    assert index.overlaps(range(1, 101)) == {two: 50}
    assert index.clean(10)
    assert index.add_worker() not in (one, two)
    while index.clean(10):
        pass
    reused = index.add_worker()
    assert reused == one
    assert index.overlaps([1]) == {two: 1}


def test_slots_beyond_a_machine_word() -> None:
    index = PrefixIndex()
    slots = [index.add_worker() for _ in range(200)]
    for slot in slots:
        index.add(slot, range(slot + 1))
    assert index.overlaps(range(500)) == {slot: slot + 1 for slot in slots}


def test_an_unknown_slot_is_refused() -> None:
    with pytest.raises(KeyError):
        PrefixIndex().add(0, [1])
