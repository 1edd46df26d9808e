"""Which fixed shape a decode step takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.params import SamplingParams
from services.worker.engines.torch.runner.buckets import Shape, all_shapes, is_decode, shape_of
from services.worker.plan import ScheduledSequence, StepPlan


@given(st.integers(1, 300), st.integers(1, 20_000), st.integers(1, 256), st.integers(1, 10_000))
def test_shapes_hold_what_they_are_for(rows: int, blocks: int, most: int, width: int) -> None:
    found = shape_of(rows, blocks, most, width)
    if rows > most or blocks > width:
        assert found is None
        return
    assert found is not None
    assert rows <= found.rows <= min(most, 2 * rows)
    assert blocks <= found.width <= min(width, max(64, 2 * blocks))
    assert found in set(all_shapes(most, width))


def test_shapes_are_few() -> None:
    assert shape_of(5, 3, 48, 1000) == Shape(8, 64)
    assert shape_of(33, 65, 48, 1000) == Shape(48, 128)
    assert len(set(all_shapes(64, 8192))) == len(list(all_shapes(64, 8192))) == 7 * 8
    assert list(all_shapes(1, 10)) == [Shape(1, 10)]


def test_only_single_sampled_tokens_are_a_decode() -> None:
    one = ScheduledSequence(0, [1], 4, [0], True, SamplingParams())
    assert is_decode(StepPlan([one, one]))
    assert not is_decode(StepPlan([one, one._replace(token_ids=[1, 2])]))
    assert not is_decode(StepPlan([one._replace(sample=False)]))
    assert not is_decode(StepPlan([one._replace(scored=range(4, 5))]))
