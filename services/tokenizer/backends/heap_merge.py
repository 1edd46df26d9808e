"""Greedy merges of neighbours with a heap: n log n, whatever merges.

    of all neighbouring pairs that one of least value merges, the leftmost of
    equals, until none merges

Symbols are a linked list over their first positions; the heap holds value * n +
position, and an entry counts only while its pair has its value. What symbols and
values are is the caller's.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

S = TypeVar("S")


def merge(
    symbols: list[S],
    value_of: Callable[[S, S], int],
    join: Callable[[S, S, int], S],
    none: int,
) -> list[S]:
    """What symbols become; `symbols` is the caller's no more.

    `value_of(left, right)` is 0 or more, and `none` for a pair that does not merge;
    `join(left, right, value)` is what it becomes.
    """
    n = len(symbols)
    following = [*range(1, n), -1]
    before = list(range(-1, n - 1))
    values = [value_of(left, right) for left, right in pairwise(symbols)]
    values.append(none)
    heap = [value * n + at for at, value in enumerate(values) if value != none]
    heapify(heap)

    def renew(at: int) -> None:
        value = value_of(symbols[at], symbols[following[at]])
        values[at] = value
        if value != none:
            heappush(heap, value * n + at)

    while heap:
        value, at = divmod(heappop(heap), n)
        if values[at] != value:
            continue
        gone = following[at]
        symbols[at] = join(symbols[at], symbols[gone], value)
        values[gone] = none
        following[at] = following[gone]
        if following[at] >= 0:
            before[following[at]] = at
            renew(at)
        else:
            values[at] = none
        if before[at] >= 0:
            renew(before[at])
    merged, at = [], 0 if symbols else -1
    while at >= 0:
        merged.append(symbols[at])
        at = following[at]
    return merged
