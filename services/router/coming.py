"""Blocks that prompts in flight will have computed on a worker, though nobody owns them yet.

Between a decision and the worker's first event of it lies a prefill; a sibling that
comes meanwhile finds nothing of their common prefix in the prefix index. Here it does.
A block id stands for all blocks before it, so of a prompt's ids a worker will have a
run without gaps, and its end is found by bisection.

    count of an id on a worker = reservations there that hold the id

Bounded: a worker's ids beyond `MAX_IDS` are not taken, and the choice knows less.
Pure memory; it knows no request, no clock and no policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.router.reservations import WorkerKey

#: Ids that are kept for one worker: a million tokens in blocks of 16, some 10 MB.
MAX_IDS = 65_536


class Coming:
    """How many reservations hold each id, by worker."""

    def __init__(self) -> None:
        self._counts: dict[WorkerKey, dict[int, int]] = {}

    def __len__(self) -> int:
        """Ids held, each counted once for every worker."""
        return sum(map(len, self._counts.values()))

    @property
    def workers(self) -> dict[WorkerKey, dict[int, int]]:
        """The counts by worker, to look up whether a worker has any; not to be changed."""
        return self._counts

    def add(self, worker: WorkerKey, ids: Sequence[int]) -> bool:
        """A reservation holds `ids`. False if that would be too many: none of them is held."""
        counts = self._counts.get(worker)
        if counts is None:
            counts = self._counts[worker] = {}
        if len(counts) + len(ids) > MAX_IDS:
            return False
        get = counts.get
        for block in ids:
            counts[block] = get(block, 0) + 1
        return True

    def remove(self, worker: WorkerKey, ids: Sequence[int]) -> None:
        """What `add` took is held no more."""
        counts = self._counts[worker]
        for block in ids:
            count = counts[block]
            if count == 1:
                del counts[block]
            else:
                counts[block] = count - 1
        if not counts:
            del self._counts[worker]

    def reach(self, worker: WorkerKey, ids: Sequence[int], start: int) -> int:
        """How many leading blocks of `ids` the worker will hold, that has `start` of them."""
        counts = self._counts.get(worker)
        if counts is None or start >= len(ids) or ids[start] not in counts:
            return start
        low, high = start, len(ids)
        while high - low > 1:
            middle = (low + high) // 2
            if ids[middle] in counts:
                low = middle
            else:
                high = middle
        return low + 1
