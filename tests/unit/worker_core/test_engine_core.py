"""The engine core over sim's runner: ends, prefix reuse, preemption, priorities, times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from headrace.blocks import block_ids, pack_tokens, short_id
from headrace.errors import StartupError
from services.worker.engine import EngineStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.worker_core.conftest import TinyEngine

    Tiny = Callable[..., TinyEngine]

EOS = 9
NAMESPACE = bytes(16)


def test_a_sequence_ends_at_max_tokens_and_counts(tiny: Tiny) -> None:
    engine = tiny()
    end = engine.run([1, 2, 3], max_tokens=5)
    assert (end.reason, end.stopped_by_token, end.error) == ("length", False, "")
    assert (end.prompt_tokens, end.completion_tokens, end.cached_tokens) == (3, 5, 0)


def test_without_max_tokens_a_sequence_ends_with_the_context(tiny: Tiny) -> None:
    assert tiny(context_len=12).run([1, 2, 3], max_tokens=None).completion_tokens == 9
    assert tiny(num_blocks=3).run([1, 2, 3], max_tokens=None).completion_tokens == 9


def test_an_end_token_is_the_last_one_delivered(tiny: Tiny) -> None:
    engine = tiny(table=(EOS,))
    end = engine.run([1], max_tokens=5)
    assert (end.reason, end.stopped_by_token, end.completion_tokens) == ("stop", True, 1)
    assert engine.outputs[end.sequence_id] == [EOS]


def test_ignore_eos_ignores_end_tokens_but_not_stop_tokens(tiny: Tiny) -> None:
    assert tiny(table=(EOS,)).run([1], ignore_eos=True).reason == "length"
    end = tiny(table=(3,)).run([1], ignore_eos=True, stop_token_ids=(7, 3))
    assert (end.reason, end.completion_tokens) == ("stop", 1)


def test_a_second_run_reuses_all_full_blocks_but_the_last_tokens(tiny: Tiny) -> None:
    engine = tiny()
    prompt = [1, 2, 3, 0, 1, 2, 3, 0]
    assert engine.run(prompt).cached_tokens == 0
    # A prompt of exactly two blocks leaves its last token, so its last block, to compute.
    assert engine.run(prompt).cached_tokens == 4
    assert engine.run([*prompt, 1]).cached_tokens == 8
    assert engine.run([*prompt, 1], namespace=bytes([1]) * 16).cached_tokens == 0


def test_the_next_turn_finds_the_answers_blocks_under_the_shared_ids(tiny: Tiny) -> None:
    engine = tiny()
    prompt = [1, 2, 3]
    end = engine.run(prompt, max_tokens=6)
    turn = prompt + engine.outputs[end.sequence_id]
    ids = block_ids(pack_tokens(turn), 4, NAMESPACE)
    assert {short_id(block_id) for block_id in ids} == engine.owned
    assert engine.run([*turn, 2, 2]).cached_tokens == 8


def test_two_sequences_share_blocks_while_they_run(tiny: Tiny) -> None:
    engine = tiny()
    prompt = [1, 2, 3, 0, 1, 2, 3, 0]
    engine.run([*prompt, 1])
    engine.submit([*prompt, 1])
    engine.submit([*prompt, 2])
    engine.step()
    # Two shared blocks, and one for each.
    assert engine.core.stats().used_blocks == 4
    engine.drain()


def test_simultaneous_twins_cache_one_block_each(tiny: Tiny) -> None:
    engine = tiny(max_step_tokens=16)
    prompt = [1, 2, 3, 0, 1]
    engine.submit(prompt)
    engine.submit(prompt)
    output = engine.step()
    assert len(output.stored) == 1
    engine.drain()


@pytest.mark.parametrize("num_generated", [1, 3, 5])
def test_a_resumed_sequence_goes_on_as_if_undisturbed(tiny: Tiny, num_generated: int) -> None:
    whole = tiny()
    end = whole.run([1, 2, 3], max_tokens=6)
    tokens = whole.outputs[end.sequence_id]

    engine = tiny()
    engine.run([1, 2, 3], max_tokens=4)
    resumed = engine.run([1, 2, 3], max_tokens=6, generated=tokens[:num_generated])
    assert engine.outputs[resumed.sequence_id] == tokens
    assert (resumed.prompt_tokens, resumed.completion_tokens) == (3, 6)
    # The first run cached the block of prompt and generated tokens alike.
    assert resumed.cached_tokens == 4 * (num_generated > 1)


def test_a_resume_that_was_complete_ends_at_once(tiny: Tiny) -> None:
    engine = tiny(context_len=12)
    for options, reason in (
        ({"max_tokens": 2, "generated": [1, 1]}, "length"),
        ({"max_tokens": 5, "generated": [1, EOS]}, "stop"),
        ({"max_tokens": None, "generated": [1] * 10}, "length"),
    ):
        sequence_id = engine.submit([1, 2], **options)
        output = engine.step()
        assert output.token_ids == []
        assert engine.ends[sequence_id].reason == reason
    assert engine.plans == []
    engine.drain()


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ([], {}, "prompt_ids must not be empty"),
        ([1] * 12, {}, "fewer than the context length of 12 tokens, not 12"),
        ([1] * 8, {"generated": [1] * 5}, "fewer than the context length of 12 tokens, not 13"),
        ([1, 10], {}, "prompt_ids must be below the vocabulary size 10, not 10"),
        ([1], {"generated": [-1]}, "generated_ids must be below the vocabulary size 10, not -1"),
        ([1], {"namespace": b"short"}, "namespace_key must be 16 bytes, not 5"),
    ],
)
def test_what_can_never_run_ends_with_an_error_that_names_it(
    tiny: Tiny, prompt: list[int], options: dict[str, object], error: str
) -> None:
    engine = tiny(context_len=12)
    healthy = engine.submit([1, 2])
    bad = engine.submit(prompt, **options)
    engine.step()
    assert engine.ends[bad].reason == "error"
    assert error in engine.ends[bad].error
    engine.drain()
    assert engine.ends[healthy].reason == "length"


def test_more_than_the_kv_cache_can_hold_is_an_error(tiny: Tiny) -> None:
    end = tiny(num_blocks=3).run([1] * 12)
    assert end.reason == "error"
    assert "the KV cache's size of 12 tokens, not 12" in end.error


def test_an_id_that_has_not_ended_is_a_fault_of_the_caller(tiny: Tiny) -> None:
    engine = tiny()
    sequence_id = engine.submit([1])
    with pytest.raises(ValueError, match="is here already"):
        engine.core.submit([engine.requests[sequence_id]])


def test_cancel_frees_at_once_and_ends_with_the_next_step(tiny: Tiny) -> None:
    engine = tiny(max_sequences=1)
    running, waiting = engine.submit([1, 2], None), engine.submit([1, 3], None)
    engine.step()
    engine.step()
    engine.core.cancel([running, waiting, 12345])
    assert engine.core.stats().used_blocks == 0
    assert engine.core.has_work()
    num_plans = len(engine.plans)
    output = engine.step()
    assert [end.reason for end in output.ends] == ["cancelled", "cancelled"]
    assert [end.completion_tokens for end in output.ends] == [2, 0]
    assert output.token_ids == []
    assert len(engine.plans) == num_plans
    assert not engine.core.has_work()
    engine.core.cancel([running])
    assert not engine.core.has_work()


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks(tiny: Tiny) -> None:
    engine = tiny(num_blocks=40)
    short = engine.submit([1], max_tokens=20)
    engine.step()
    long = engine.submit([2] * 50)
    for _ in range(8):
        assert engine.step().sequence_ids[0] == short
    assert engine.outputs[long]
    assert all(plan.num_tokens <= 8 for plan in engine.plans)
    engine.drain()


def test_preemption_recomputes_cheaply_and_changes_no_output(tiny: Tiny) -> None:
    engine = tiny(num_blocks=6)
    first, second = engine.submit([1, 2, 3], None), engine.submit([3, 2, 1], None)
    waits = []
    for _ in range(30):
        engine.step()
        waits.append(engine.core.stats().queued_sequences)
    assert waits[0] == 0
    assert 1 in waits
    engine.drain()
    assert list(engine.ends) == [first, second]
    # The second computed some tokens twice, but not those that stayed cached.
    computed = [
        position
        for plan in engine.plans
        for item in plan.scheduled
        if item.sequence_id == second
        for position in range(item.start, item.end)
    ]
    assert len(computed) > len(set(computed)) == 23


def test_higher_priority_is_admitted_first_and_preempted_last(tiny: Tiny) -> None:
    engine = tiny(max_sequences=1)
    for priority in (0, 1, 0, 2, 1):
        engine.submit([1, priority], priority=priority)
    engine.drain()
    assert list(engine.ends) == [4, 2, 5, 1, 3]

    engine = tiny(num_blocks=6)
    low, high = engine.submit([1], None), engine.submit([2], None, priority=1)
    engine.drain()
    assert list(engine.ends) == [high, low]


def test_nothing_starves_under_a_stream_of_small_sequences(tiny: Tiny) -> None:
    engine = tiny(num_blocks=12)
    engine.submit([2], max_tokens=30)
    large = engine.submit([1] * 40, max_tokens=3)
    for _ in range(60):
        engine.submit([2, 3], max_tokens=6)
        engine.step()
    assert large in engine.ends
    engine.drain()


def test_times_and_stats_are_of_the_engines_clock(tiny: Tiny) -> None:
    engine = tiny(max_sequences=1)
    first = engine.submit([1] * 16, max_tokens=3)
    second = engine.submit([2] * 2, max_tokens=1)
    engine.step()
    stats = engine.core.stats()
    assert (stats.active_sequences, stats.queued_sequences) == (1, 1)
    assert (stats.queued_prefill_tokens, stats.used_blocks, stats.total_blocks) == (10, 2, 8)
    engine.drain()
    end = engine.ends[first]
    # 16 tokens at 1 ms in two steps, then two decodes at 10 ms.
    assert (end.queue_ms, end.prefill_ms, end.decode_ms) == pytest.approx((0, 16, 20))
    end = engine.ends[second]
    assert (end.queue_ms, end.prefill_ms, end.decode_ms) == pytest.approx((36, 2, 0))
    stats = engine.core.stats()
    assert (stats.prefill_tokens, stats.decode_steps) == (18, 2)
    assert (stats.prefill_steps, stats.decode_sequences) == (3, 2)
    assert stats.step_ms == pytest.approx(38)


def test_siblings_wait_for_the_prompt_that_one_of_them_computes(tiny: Tiny) -> None:
    engine = tiny(max_step_tokens=8, num_blocks=20)
    prompt = [1, 2, 3, 0] * 4 + [1]
    siblings = [engine.submit(prompt, max_tokens=3) for _ in range(3)]
    other = engine.submit([3], max_tokens=1)
    engine.step()
    # What has nothing in common with them does not wait.
    assert engine.core.stats().active_sequences == 1
    engine.step()
    engine.step()
    assert other in engine.ends
    engine.drain()
    assert [engine.ends[sibling].cached_tokens for sibling in siblings] == [0, 16, 16]
    computed = sum(
        len(i.token_ids) for plan in engine.plans for i in plan.scheduled if i.start < 16
    )
    assert computed == 16 + 1


def test_a_sibling_goes_on_alone_when_the_one_that_computes_is_cancelled(tiny: Tiny) -> None:
    engine = tiny(max_step_tokens=8, num_blocks=20)
    prompt = [1, 2, 3, 0] * 4 + [1]
    first, second = engine.submit(prompt), engine.submit(prompt)
    engine.step()
    engine.core.cancel([first])
    engine.drain()
    assert engine.ends[second].cached_tokens == 8


def test_windowed_layers_give_blocks_up(tiny: Tiny) -> None:
    engine = tiny(num_blocks=5, windows=(4,), context_len=200, max_sequences=1)
    engine.submit([1] * 50, max_tokens=100)
    while engine.core.has_work():
        engine.step()
        assert engine.core.stats().used_blocks <= 4
    engine.drain()
    # Beside a group that keeps everything.
    engine = tiny(num_blocks=50 + 4, windows=(None, 4), context_len=200, max_sequences=1)
    assert engine.run([1] * 100, max_tokens=100).completion_tokens == 100


def test_a_prefix_is_reused_only_where_every_window_still_has_its_end(tiny: Tiny) -> None:
    engine = tiny(num_blocks=24, windows=(None, 8), max_sequences=1)
    prompt = [1, 2, 3, 0] * 4
    engine.run(prompt, max_tokens=1)
    assert engine.run([*prompt, 2], max_tokens=1).cached_tokens == 16
    assert engine.run([*prompt[:8], 3, 3], max_tokens=1).cached_tokens == 8


def test_tenants_share_admissions_by_what_they_were_served(tiny: Tiny) -> None:
    engine = tiny(num_blocks=40, max_sequences=1)
    greedy = [engine.submit([1, 2], max_tokens=2, tenant="greedy") for _ in range(6)]
    modest = [engine.submit([2, 1], max_tokens=2, tenant="modest") for _ in range(2)]
    engine.drain()
    order = list(engine.ends)
    assert order.index(modest[1]) < order.index(greedy[3])


def test_an_earlier_deadline_goes_first_within_a_tenant(tiny: Tiny) -> None:
    engine = tiny(max_sequences=1)
    running = engine.submit([1], max_tokens=2)
    engine.step()
    patient, urgent = engine.submit([2]), engine.submit([3], timeout_ms=500)
    engine.drain()
    assert list(engine.ends) == [running, urgent, patient]


def test_a_mixed_step_counts_as_prefill_and_decode(tiny: Tiny) -> None:
    engine = tiny()
    engine.submit([1, 2], max_tokens=3)
    engine.step()
    engine.submit([2, 3], max_tokens=1)
    engine.step()
    stats = engine.core.stats()
    assert (stats.prefill_tokens, stats.prefill_steps) == (4, 2)
    assert (stats.prefill_squares, stats.prefill_context) == (8, 0)
    assert (stats.decode_steps, stats.decode_sequences, stats.decode_context) == (1, 1, 3)


def test_an_idle_step_brings_nothing(tiny: Tiny) -> None:
    engine = tiny()
    assert not engine.core.has_work()
    output = engine.step()
    assert (output.token_ids, output.ends, output.stored) == ([], [], [])
    assert output.stats == EngineStats(total_blocks=8)


def test_limits_that_cannot_work_are_refused(tiny: Tiny) -> None:
    with pytest.raises(StartupError, match=r"max_step_tokens must be at least max_sequences \(4\)"):
        tiny(max_step_tokens=3)
    with pytest.raises(StartupError, match="max_sequences must be 1 or more, not 0"):
        tiny(max_sequences=0)
