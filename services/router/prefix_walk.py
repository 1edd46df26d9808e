"""One prompt's ids found in the tables, and how far along it each worker's bit holds out.

What the prefix index asks for a prompt. It changes nothing, and knows of workers bits alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from services.router.block_table import BlockTable, Ids, Positions

_WORD = (1 << 64) - 1


class Walk:
    """A prompt's ids found, up to the first that nobody is known to hold."""

    __slots__ = ("_found", "_old_found", "_stashed", "length")

    def __init__(
        self,
        found: tuple[BlockTable, Positions],
        is_complete: bool,
        old: BlockTable | None,
        stash: dict[int, int],
        ids: Ids,
    ) -> None:
        """`found`: where the ids are in the table, -1 for those that are elsewhere.

        `is_complete` says that there are none such; False may be said of any.
        """
        self._found = found
        self._old_found: tuple[BlockTable, Positions] | None = None
        self.length = len(ids)
        self._stashed: list[tuple[int, int]] = []
        if is_complete:
            return
        missing = found[1] < 0
        if old is not None:
            self._old_found = (old, old.find_all(ids)[0])
            missing &= self._old_found[1] < 0
        for at in missing.nonzero()[0].tolist():
            masks = stash.get(int(ids[at]), 0)
            if not masks:
                self.length = at
                break
            self._stashed.append((at, masks))

    def masks(self, plane: int) -> Ids:
        """The plane's bits for each id."""
        table, found = self._found
        masks: Ids = table.planes[plane].take(found[: self.length])
        if self._old_found is not None:
            table, found = self._old_found
            masks |= table.planes[plane].take(found[: self.length])
        for at, stashed in self._stashed:
            masks[at] |= np.uint64((stashed >> (64 * plane)) & _WORD)
        return masks


def count_leading(masks: Ids, live: int, first_slot: int, counts: dict[int, int]) -> None:
    """Into `counts`: for each live bit of masks[0], how many leading masks have it."""
    alive = np.bitwise_and.accumulate(masks)
    bits = int(alive[0]) & live
    whole = int(alive[-1]) & live
    if bits != whole:
        # Each depth at which some are lost, the first first.
        for last in (alive[1:] != alive[:-1]).nonzero()[0].tolist():
            kept = int(alive[last + 1]) & live
            _note(bits & ~kept, last + 1, first_slot, counts)
            bits = kept
    _note(whole, len(masks), first_slot, counts)


def _note(bits: int, count: int, first_slot: int, counts: dict[int, int]) -> None:
    while bits:
        lowest = bits & -bits
        counts[first_slot + lowest.bit_length() - 1] = count
        bits ^= lowest
