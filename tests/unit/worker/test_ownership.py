"""The arithmetic of owned blocks, against its plain twin: two sets and a list of slots."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.registry import unpack_short_ids
from services.worker.ownership import OwnedBlocks

IDS = st.integers(min_value=1, max_value=40)
STEPS = st.lists(
    st.tuples(st.sets(IDS, max_size=8), st.sets(IDS, max_size=8), st.integers(0, 12)), max_size=30
)


def written(string: bytearray, writes: tuple[tuple[int, bytes], ...]) -> None:
    """What SETRANGE does."""
    for offset, data in writes:
        string.extend(bytes(max(0, offset + len(data) - len(string))))
        string[offset : offset + len(data)] = data


@given(STEPS, st.integers(0, 30))
def test_what_is_taken_always_leads_to_what_the_engine_has(
    steps: list[tuple[set[int], set[int], int]], snapshot_at: int
) -> None:
    owned = OwnedBlocks()
    engine: set[int] = set()
    readers: set[int] = set()
    string = bytearray()
    most = 0
    for index, (stored, removed, limit) in enumerate(steps):
        # As an engine reports: net, of what it really has.
        stored, removed = stored - engine, (removed & engine) - stored
        engine = engine - removed | stored
        owned.apply(stored, removed)
        most = max(most, len(engine))
        if index == snapshot_at:
            string = bytearray(owned.snapshot())
            readers = set(engine)
            assert not owned.has_changes
        if limit:
            change = owned.take(limit)
            assert len(change.stored) + len(change.removed) <= limit
            assert not set(change.stored) & set(change.removed)
            readers = readers - set(change.removed) | set(change.stored)
            written(string, change.writes)
        packed = [block for block in unpack_short_ids(bytes(string)) if block]
        assert sorted(packed) == sorted(readers)
        assert sorted(owned.published_of(engine)) == sorted(readers)
    while owned.has_changes:
        change = owned.take(5)
        readers = readers - set(change.removed) | set(change.stored)
        written(string, change.writes)
    assert readers == engine
    assert {block for block in unpack_short_ids(bytes(string)) if block} == engine


def test_what_comes_and_goes_between_two_publications_is_no_change() -> None:
    owned = OwnedBlocks()
    owned.apply([1, 2], [])
    owned.take(10)
    owned.apply([3], [1])
    owned.apply([1], [3])
    assert not owned.has_changes


def test_blocks_that_come_together_are_written_together() -> None:
    owned = OwnedBlocks()
    owned.apply(range(1, 101), [])
    assert len(owned.take(1000).writes) == 1
    owned.apply([], range(1, 101))
    owned.apply(range(201, 301), [])
    change = owned.take(1000)
    assert len(change.writes) == 1
    assert len(change.writes[0][1]) == 800
