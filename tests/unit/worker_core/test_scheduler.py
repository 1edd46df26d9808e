"""The scheduler alone: snapshots in, decisions out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.worker.scheduling import CachedPrefix, Chunk, Groups, Snapshot, blocks_for, schedule

BLOCK = 4


@dataclass(frozen=True)
class Item:
    sequence_id: int
    num_tokens: int
    num_computed: int = 0
    num_blocks: int = 0


def decoding(sequence_id: int, num_tokens: int) -> Item:
    """A sequence whose last token waits to be computed; it holds blocks for the others."""
    held = blocks_for(num_tokens - 1, BLOCK)
    return Item(sequence_id, num_tokens, num_tokens - 1, held)


def prefilling(sequence_id: int, num_tokens: int, num_computed: int = 0) -> Item:
    """A sequence that holds blocks for what is computed of it."""
    return Item(sequence_id, num_tokens, num_computed, blocks_for(num_computed, BLOCK))


def snapshot(running: list[Item], waiting: list[Item], **changes: Any) -> Snapshot:
    defaults = Snapshot(
        running=running,
        waiting=waiting,
        num_available_blocks=100,
        block_size=BLOCK,
        max_step_tokens=16,
        max_sequences=8,
        cached_prefix=lambda _: CachedPrefix(),
        num_exclusive_blocks=lambda item: item.num_blocks,
    )
    return replace(defaults, **changes)


def test_decodes_come_first_and_a_prefill_gets_the_rest_of_the_budget() -> None:
    decision = schedule(snapshot([prefilling(1, 100), decoding(2, 9), decoding(3, 6)], []))
    assert decision.decodes == [Chunk(2, 1, 1), Chunk(3, 1, 0)]
    assert decision.prefills == [Chunk(1, 14, 4)]


def test_prefills_share_the_budget_in_order() -> None:
    decision = schedule(snapshot([prefilling(1, 30, 20), prefilling(2, 30)], [Item(3, 5)]))
    assert decision.prefills == [Chunk(1, 10, 3), Chunk(2, 6, 2)]
    assert decision.admissions == []


def test_admission_takes_slots_tokens_and_blocks_in_order() -> None:
    waiting = [Item(1, 10), Item(2, 10), Item(3, 10)]
    assert schedule(snapshot([], waiting)).admissions == [Chunk(1, 10, 3), Chunk(2, 6, 2)]
    only_one = schedule(snapshot([], waiting, max_sequences=1))
    assert [chunk.sequence_id for chunk in only_one.admissions] == [1]
    # The second would leave no block for the first to grow into.
    tight = schedule(snapshot([], waiting, max_step_tokens=64, num_available_blocks=6))
    assert [chunk.sequence_id for chunk in tight.admissions] == [1]


def test_a_small_sequence_does_not_overtake_one_that_does_not_fit() -> None:
    decision = schedule(
        snapshot([decoding(1, 6)], [Item(2, 40), Item(3, 2)], num_available_blocks=5)
    )
    assert decision.admissions == []


def test_a_cached_prefix_saves_tokens_and_blocks_that_someone_uses() -> None:
    prefix = CachedPrefix(num_blocks=3, num_unused=1)
    decision = schedule(
        snapshot(
            [decoding(1, 6)],
            [Item(2, 15)],
            num_available_blocks=3,
            cached_prefix=lambda _: prefix,
        )
    )
    assert decision.admissions == [Chunk(2, 3, num_new_blocks=1, num_cached_blocks=3)]
    unused = replace(prefix, num_unused=2)
    decision = schedule(
        snapshot(
            [decoding(1, 6)],
            [Item(2, 15)],
            num_available_blocks=3,
            cached_prefix=lambda _: unused,
        )
    )
    assert decision.admissions == []


def test_without_blocks_the_last_gives_way_and_nothing_is_admitted() -> None:
    running = [decoding(1, 9), decoding(2, 9), decoding(3, 7)]
    decision = schedule(snapshot(running, [Item(4, 1)], num_available_blocks=1))
    assert decision.preempted == [3]
    assert decision.decodes == [Chunk(1, 1, 1), Chunk(2, 1, 1)]
    assert decision.admissions == []


def test_the_last_itself_gives_way() -> None:
    running = [decoding(1, 9), decoding(2, 9)]
    decision = schedule(snapshot(running, [], num_available_blocks=1))
    assert decision.preempted == [2]
    assert decision.decodes == [Chunk(1, 1, 1)]


def test_shared_blocks_of_a_victim_make_no_room() -> None:
    running = [decoding(1, 9), decoding(2, 10), decoding(3, 11)]
    decision = schedule(
        snapshot(
            running,
            [],
            num_available_blocks=0,
            num_exclusive_blocks=lambda item: 0 if item.sequence_id == 3 else 1,
        )
    )
    assert decision.preempted == [3, 2]
    assert decision.decodes == [Chunk(1, 1, 1)]


def test_blocks_that_a_running_prefill_still_needs_are_not_given_away() -> None:
    running = [prefilling(1, 40, 8)]
    tight = snapshot(running, [Item(2, 4)], num_available_blocks=9, max_step_tokens=12)
    assert [chunk.sequence_id for chunk in schedule(tight).prefills] == [1]
    assert schedule(replace(tight, max_step_tokens=20)).admissions == []
    roomy = replace(tight, max_step_tokens=40, num_available_blocks=10)
    assert schedule(roomy).admissions == [Chunk(2, 4, 1)]


def test_a_prefill_makes_do_with_fewer_tokens_before_anyone_gives_way() -> None:
    running = [prefilling(1, 40, 8), decoding(2, 10)]
    decision = schedule(snapshot(running, [], num_available_blocks=1))
    assert decision.prefills == [Chunk(1, 4, 1)]
    assert decision.preempted == []
    decision = schedule(snapshot(running, [], num_available_blocks=0))
    assert decision.preempted == [2]
    assert decision.prefills == [Chunk(1, 12, 3)]


def test_a_prompt_that_another_computes_is_passed_over_once_its_next_block_is_coming() -> None:
    waiting = [Item(1, 9), Item(2, 9), Item(3, 5)]
    shared = CachedPrefix(next_id=b"shared")
    prefixes = {1: shared, 2: shared, 3: CachedPrefix(next_id=b"other")}
    look = snapshot([], waiting, cached_prefix=lambda item: prefixes[item.sequence_id])
    assert [chunk.sequence_id for chunk in schedule(look).admissions] == [1, 3]
    coming = schedule(replace(look, coming={b"other"}))
    assert [chunk.sequence_id for chunk in coming.admissions] == [1]


def test_windowed_groups_are_promised_no_more_than_their_window() -> None:
    # One group keeps all 10 blocks, the other 3 of them at most.
    groups = Groups(1, (3,))
    fits = snapshot(
        [decoding(1, 6)], [Item(2, 40)], num_available_blocks=15, groups=groups, max_step_tokens=9
    )
    assert schedule(fits).admissions == [Chunk(2, 8, 2)]
    assert schedule(replace(fits, num_available_blocks=14)).admissions == []


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    lengths = st.integers(1, 30)
    max_sequences = draw(st.integers(1, 6))
    running = [
        draw(st.sampled_from([decoding, prefilling]))(number, draw(lengths) + 1)
        for number in range(draw(st.integers(0, max_sequences)))
    ]
    waiting = [Item(100 + number, draw(lengths)) for number in range(draw(st.integers(0, 5)))]
    return snapshot(
        running,
        waiting,
        # The first could always run alone.
        num_available_blocks=draw(st.integers(max(0, 8 - sum(i.num_blocks for i in running)), 12)),
        max_step_tokens=max_sequences + draw(st.integers(0, 20)),
        max_sequences=max_sequences,
    )


@given(snapshots())
def test_every_decision_fits_and_the_first_in_order_advances(given_snapshot: Snapshot) -> None:
    decision = schedule(given_snapshot)
    chunks = [*decision.decodes, *decision.prefills, *decision.admissions]
    assert all(chunk.num_tokens > 0 for chunk in chunks)
    assert sum(chunk.num_tokens for chunk in chunks) <= given_snapshot.max_step_tokens
    named = [chunk.sequence_id for chunk in chunks] + decision.preempted
    assert len(named) == len(set(named))

    running = {item.sequence_id: item for item in given_snapshot.running}
    num_running = len(running) - len(decision.preempted) + len(decision.admissions)
    assert num_running <= given_snapshot.max_sequences
    freed = sum(running[sequence_id].num_blocks for sequence_id in decision.preempted)
    taken = sum(chunk.num_new_blocks for chunk in chunks)
    assert taken <= given_snapshot.num_available_blocks + freed

    # Every decode that was not preempted has its token.
    decodes = {i for i, item in running.items() if item.num_tokens - item.num_computed == 1}
    assert {chunk.sequence_id for chunk in decision.decodes} == decodes - set(decision.preempted)
    order = [*given_snapshot.running, *given_snapshot.waiting]
    if order:
        assert order[0].sequence_id in {chunk.sequence_id for chunk in chunks}
    if decision.preempted:
        assert not decision.admissions
        survivors = [i for i in running if i not in decision.preempted]
        assert list(running) == survivors + decision.preempted[::-1]
