"""Merges by the scores of tokens, as SentencePiece makes them (src/bpe_model.cc).

    symbols of a text -> the two neighbours merge that are the token of best rank
    together, leftmost if equal, until none are -> symbols

Symbols are strings: what two of them become is their concatenation, so one look-up
says whether it is a token and how good, and there is no table of pairs to make at
load. `merge_short` and `merge_long` are the same algorithm, quadratic in C and
n log n in Python; a test holds that they agree. Nothing here knows ids.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from services.tokenizer.backends import heap_merge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Texts of more symbols are merged with a heap.
MAX_SHORT_LEN = 64


class ScoreMerges:
    """Tokens and their order. Equal ranks stay equal: the leftmost goes first then."""

    def __init__(self, ranks: Sequence[float], id_of: Mapping[str, int]) -> None:
        tokens = {token: at for token, at in id_of.items() if len(token) > 1 and at < len(ranks)}
        order = {rank: at for at, rank in enumerate(sorted({ranks[i] for i in tokens.values()}))}
        self._none = len(order)
        self._order = {token: order[ranks[at]] for token, at in tokens.items()}

    def apply(self, symbols: list[str]) -> list[str]:
        """What symbols become. `symbols` is the caller's no more."""
        few = len(symbols) <= MAX_SHORT_LEN
        return self.merge_short(symbols) if few else self.merge_long(symbols)

    def merge_short(self, symbols: list[str]) -> list[str]:
        """`apply` for few: the best is searched for after each merge."""
        find, none = self._order.get, self._none
        ranks = [find(left + right, none) for left, right in pairwise(symbols)]
        while ranks:
            best = min(ranks)
            if best == none:
                break
            at = ranks.index(best)
            merged = symbols[at] = symbols[at] + symbols[at + 1]
            del symbols[at + 1], ranks[at]
            if at < len(ranks):
                ranks[at] = find(merged + symbols[at + 1], none)
            if at:
                ranks[at - 1] = find(symbols[at - 1] + merged, none)
        return symbols

    def merge_long(self, symbols: list[str]) -> list[str]:
        """`apply` for many."""
        find, none = self._order.get, self._none
        return heap_merge.merge(
            symbols,
            lambda left, right: find(left + right, none),
            lambda left, right, value: left + right,
            none,
        )
