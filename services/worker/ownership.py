"""Which blocks the worker owns and which slot each has in Redis' packed string: the arithmetic.

    published ids (with slots)  −  waiting removals  +  waiting stores  =  the engine's blocks

What the engine reports gathers as a net change, bounded by its blocks, until the
publisher takes a piece of it. It knows neither Redis nor engine.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from headrace.blocks import SHORT_ID_LEN
from headrace.registry import pack_short_ids

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Change:
    """A piece of the net change. `writes` are offsets and bytes in the packed string."""

    stored: tuple[int, ...]
    removed: tuple[int, ...]
    writes: tuple[tuple[int, bytes], ...]


class OwnedBlocks:
    """The blocks of one tier, as short ids."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        # Dicts serve as ordered sets: the oldest change is published first.
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}

    @property
    def has_changes(self) -> bool:
        """Whether something waits to be published."""
        return bool(self._stored or self._removed)

    @property
    def num_changes(self) -> int:
        """How many blocks' change waits to be published."""
        return len(self._stored) + len(self._removed)

    def apply(self, stored: Iterable[int], removed: Iterable[int]) -> None:
        """What a step of the engine changed. No id is in both."""
        for block in removed:
            if block in self._stored:
                del self._stored[block]
            elif block in self._slots:
                self._removed[block] = None
        for block in stored:
            if block in self._removed:
                del self._removed[block]
            elif block not in self._slots:
                self._stored[block] = None

    def snapshot(self) -> bytes:
        """All blocks as one packed string, in slots given anew. Nothing waits afterwards."""
        blocks = [block for block in self._slots if block not in self._removed]
        blocks += self._stored
        self._slots = {block: slot for slot, block in enumerate(blocks)}
        self._free.clear()
        self._stored.clear()
        self._removed.clear()
        return pack_short_ids(blocks)

    def take(self, limit: int) -> Change:
        """The next piece of the change, `limit` ids at most; it counts as published from now.

        Removals go first, so that the string never has more slots than the engine blocks.
        """
        removed = tuple(islice(self._removed, limit))
        stored = tuple(islice(self._stored, limit - len(removed)))
        content: dict[int, int] = {}
        slots = self._slots
        for block in removed:
            del self._removed[block]
        for block in stored:
            del self._stored[block]
        # Mostly as many come as go: they take over the slots.
        for old, new in zip(removed, stored, strict=False):
            slots[new] = slot = slots.pop(old)
            content[slot] = new
        for old in removed[len(stored) :]:
            slot = slots.pop(old)
            heapq.heappush(self._free, slot)
            content[slot] = 0
        for new in stored[len(removed) :]:
            slots[new] = slot = heapq.heappop(self._free) if self._free else len(slots)
            content[slot] = new
        return Change(stored, removed, tuple(_runs(content)))

    def published_of(self, owned: Iterable[int]) -> list[int]:
        """What readers know, given all that the engine owns: less what waits to be published."""
        return [block for block in owned if block not in self._stored] + list(self._removed)


def _runs(content: dict[int, int]) -> Iterable[tuple[int, bytes]]:
    """Slots' contents as few writes: a write costs as much as many bytes."""
    slots = sorted(content)
    start = 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] != slots[index - 1] + 1:
            run = slots[start:index]
            yield run[0] * SHORT_ID_LEN, pack_short_ids(content[slot] for slot in run)
            start = index
