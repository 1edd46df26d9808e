"""Byte-pair merges: which pairs of tokens become one, and in which order.

    ids of a word's smallest symbols -> the pair of lowest rank merges, leftmost
    if equal, until none is left -> ids

Two tables say so: a list of merges in order of rank, or a rank for each token, by
which any pair merges that is a token when put together. `merge_short` and
`merge_long` are the same algorithm, quadratic in C and n log n in Python; a test
holds that they agree. Nothing here knows bytes or text.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from services.tokenizer.backends import heap_merge

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: Words of more symbols are merged with a heap.
MAX_SHORT_LEN = 64
#: More than any rank and id together.
NONE = 1 << 62


class Merges:
    """The table of one vocabulary.

    A pair is keyed by left * size + right: an int is smaller and quicker to hash
    than a tuple. Its value is rank << shift | id of what the pair becomes, so that
    the least value is the lowest rank and says what to do.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._shift = max(size, 1).bit_length()
        self._mask = (1 << self._shift) - 1
        self._pairs: dict[int, int] = {}

    @classmethod
    def of_pairs(
        cls, pairs: Sequence[tuple[str, str]], id_of: Mapping[str, int], size: int, source: str
    ) -> Merges:
        """Of merges in order of rank. Raises StartupError for one that names no token."""
        merges = cls(size)
        table, shift = merges._pairs, merges._shift
        for rank, (left, right) in enumerate(pairs):
            try:
                key = id_of[left] * size + id_of[right]
                table[key] = rank << shift | id_of[left + right]
            except KeyError as error:
                raise StartupError(
                    f"{source}: merge {rank} ({left!r}, {right!r}) names {error}, which is no token"
                ) from error
        return merges

    @classmethod
    def of_ranks(cls, ranks: Sequence[float], id_of: Mapping[str, int], size: int) -> Merges:
        """Of tokens' ranks, by id: all pairs of tokens that are a token together."""
        merges = cls(size)
        table, shift, find = merges._pairs, merges._shift, id_of.get
        order = {rank: at for at, rank in enumerate(sorted({*ranks}))}
        for token, token_id in id_of.items():
            if len(token) < 2 or token_id >= len(ranks):
                continue
            value = order[ranks[token_id]] << shift | token_id
            for cut in range(1, len(token)):
                left, right = find(token[:cut]), find(token[cut:])
                if left is not None and right is not None:
                    table[left * size + right] = value
        return merges

    def trace(self, ids: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Each merge's value (rank first) and the ids after it, by the definition."""
        while values := [self.value(left, right) for left, right in pairwise(ids)]:
            best = min(values)
            if best == NONE:
                return
            at = values.index(best)
            ids = [*ids[:at], best & self._mask, *ids[at + 2 :]]
            yield best, ids

    def value(self, left: int, right: int) -> int:
        """The pair's value; NONE if it does not merge."""
        return self._pairs.get(left * self._size + right, NONE)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Left, right and value of all pairs that merge."""
        size = self._size
        return ((*divmod(key, size), value) for key, value in self._pairs.items())

    def apply(self, ids: list[int]) -> list[int]:
        """The ids that a word's symbols become. `ids` is the caller's no more."""
        return self.merge_short(ids) if len(ids) <= MAX_SHORT_LEN else self.merge_long(ids)

    def merge_short(self, ids: list[int]) -> list[int]:
        """`apply` for few: the least value is searched for after each merge."""
        find, size, mask = self._pairs.get, self._size, self._mask
        values = [find(left * size + right, NONE) for left, right in pairwise(ids)]
        while values:
            best = min(values)
            if best == NONE:
                break
            at = values.index(best)
            merged = ids[at] = best & mask
            del ids[at + 1], values[at]
            if at < len(values):
                values[at] = find(merged * size + ids[at + 1], NONE)
            if at:
                values[at - 1] = find(ids[at - 1] * size + merged, NONE)
        return ids

    def merge_long(self, ids: list[int]) -> list[int]:
        """`apply` for many."""
        find, size, mask = self._pairs.get, self._size, self._mask
        return heap_merge.merge(
            ids,
            lambda left, right: find(left * size + right, NONE),
            lambda left, right, value: value & mask,
            NONE,
        )
