"""KV groups: which layers share a table, and what fits."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.kv import KVGroup, block_layers, capacity, group_layers, most_blocks, reach


def test_layers_of_one_kind_are_one_group() -> None:
    assert group_layers([None] * 3) == (KVGroup((0, 1, 2), None),)
    assert group_layers([8] * 3) == (KVGroup((0, 1, 2), 8),)


def test_gemmas_pattern_becomes_groups_of_the_size_of_its_full_layers() -> None:
    windows = [None if layer % 6 == 5 else 512 for layer in range(18)]
    groups = group_layers(windows)
    assert groups[0] == KVGroup((5, 11, 17), None)
    assert [len(group.layers) for group in groups] == [3] * 6
    assert block_layers(groups) == 3


def test_a_kind_that_does_not_divide_is_spread_evenly() -> None:
    windows = [None if layer % 6 == 5 else 512 for layer in range(26)]
    lengths = [len(group.layers) for group in group_layers(windows)]
    assert (lengths[0], sorted(lengths)) == (4, [3, 3, 4, 4, 4, 4, 4])


@given(st.lists(st.sampled_from([None, 4, 16]), min_size=1, max_size=40))
def test_every_layer_is_in_one_group_of_its_window(windows: list[int | None]) -> None:
    groups = group_layers(windows)
    found = {layer: group.window for group in groups for layer in group.layers}
    assert found == dict(enumerate(windows))
    assert sum(len(group.layers) for group in groups) == len(windows)


@pytest.mark.parametrize(
    ("window", "expected"), [(None, None), (1, 0), (2, 1), (5, 1), (6, 2), (512, 128)]
)
def test_reach(window: int | None, expected: int | None) -> None:
    assert reach(window, 4) == expected


@given(
    st.lists(st.none() | st.integers(1, 30), min_size=1, max_size=4),
    st.integers(0, 60),
    st.integers(1, 5),
    st.integers(1, 9),
)
def test_capacity_is_the_longest_that_fits(
    windows: list[int | None], num_blocks: int, block_size: int, max_step_tokens: int
) -> None:
    groups = [KVGroup((layer,), window) for layer, window in enumerate(windows)]
    found = capacity(groups, num_blocks, block_size, max_step_tokens)

    def taken(length: int) -> int:
        return sum(
            min(length, sys.maxsize if w is None else most_blocks(w, block_size, max_step_tokens))
            for w in windows
        )

    if found == sys.maxsize:
        assert None not in windows
        assert taken(10**6) <= num_blocks
    else:
        assert found % block_size == 0
        assert taken(found // block_size) <= num_blocks < taken(found // block_size + 1)
