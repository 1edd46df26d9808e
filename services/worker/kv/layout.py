"""Which layers share a table of blocks: a pure decision over layers' windows.

A layer that attends to the last `window` positions needs no more of a sequence
than those; one that attends to all needs everything. So layers are cut into
groups of one window and (nearly) one size, and a physical block holds the KV of
`block_size` positions for the layers of *one* group. All groups then draw from
one pool of equal blocks, and what a windowed group gives up, any group can use:

    layers   0 1 2 3 4 5   of windows  w w - w w -
    groups   (2 5) full    (0 1) window    (3 4) window

Groups of unequal size leave room unused in the smaller one's blocks.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose KV lies in one table. `window` is in positions, the own one counted."""

    layers: tuple[int, ...]
    window: int | None = None


def group_layers(windows: Sequence[int | None]) -> tuple[KVGroup, ...]:
    """The groups for layers of these windows, those that keep everything first."""
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)
    size = min(map(len, kinds.values()))
    groups = []
    for window in sorted(kinds, key=lambda w: (w is not None, w or 0)):
        layers = kinds[window]
        count = -(-len(layers) // size)
        ends = [len(layers) * part // count for part in range(count + 1)]
        groups += [KVGroup(tuple(layers[start:end]), window) for start, end in pairwise(ends)]
    return tuple(groups)


def block_layers(groups: Sequence[KVGroup]) -> int:
    """Layers that a physical block has room for."""
    return max(len(group.layers) for group in groups)


def reach(window: int | None, block_size: int) -> int | None:
    """Full blocks before a position that starts a block which that position needs; None: all."""
    return None if window is None else -(-(window - 1) // block_size)


def most_blocks(window: int, block_size: int, max_step_tokens: int) -> int:
    """Physical blocks of one sequence that a windowed group ever uses at once: its
    window and a step's tokens, neither beginning with a block."""
    return -(-(window + max_step_tokens) // block_size) + 1


def capacity(
    groups: Sequence[KVGroup], num_blocks: int, block_size: int, max_step_tokens: int
) -> int:
    """The longest sequence, in tokens, that `num_blocks` physical blocks can hold."""
    limits = [
        sys.maxsize
        if group.window is None
        else most_blocks(group.window, block_size, max_step_tokens)
        for group in groups
    ]
    if sum(limits) <= num_blocks:
        return sys.maxsize
    lengths = range(1, num_blocks + 1)
    return block_size * bisect_right(
        lengths, num_blocks, key=lambda length: sum(min(length, limit) for limit in limits)
    )
