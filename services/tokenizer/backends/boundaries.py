"""Where a text can be cut so that byte-pair merges of the parts are those of the whole.

Merging makes nothing but tokens. So a symbol can reach across the place between two
characters only if some token has these two side by side; where none has, what is
left and what is right of it never meet, and are merged as if alone: the cut is
exact. SentencePiece's vocabularies have no pre-tokenizer, but were trained on words
that begin with U+2581 and on one script at a time, so that such places are many:
before U+2581 nearly everywhere (Gemma has one token that reaches across, ">▁</"),
between ASCII letters and punctuation, around digits.

    units     by one regular expression: what a word cache is asked for
    pieces    of a long unit, by all pairs of neighbours: Chinese, mostly

Nothing here knows ranks or ids.
"""

from __future__ import annotations

import re
from operator import add
from string import ascii_letters, digits, punctuation
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

SPACE = "\u2581"

#: In no token and no text: a surrogate.
_BETWEEN = "\ud800"

#: More tokens that reach across the place before U+2581, and it is no place to cut.
_MAX_ACROSS = 16
#: Characters that are units of their own if no token has them with others.
_ALONE = digits + "\n\t"


class Boundaries:
    """The cuts that one vocabulary allows.

    `tokens` are all that merging can make. With `unknown_fuses`, characters that are
    no token become one unknown token in a row, so that no cut may part two of them.
    """

    def __init__(self, tokens: Collection[str], *, unknown_fuses: bool = False) -> None:
        joined = _BETWEEN.join(tokens)
        pairs = set(map(add, joined, joined[1:]))
        #: Characters that are side by side in some token.
        self._pairs = {pair for pair in pairs if _BETWEEN not in pair}
        self._unknown_fuses = unknown_fuses
        self._known = {token for token in tokens if len(token) == 1}
        #: The units of a text, in order: units(text). None if whole texts must do.
        self.units = self._compile(tokens)

    def pieces(self, unit: str) -> list[str]:
        """A unit, cut wherever no token has both neighbours."""
        pairs, known = self._pairs, self._known
        cuts = [at for at, pair in enumerate(map(add, unit, unit[1:]), 1) if pair not in pairs]
        if self._unknown_fuses and not known.issuperset(unit):
            cuts = [at for at in cuts if unit[at - 1] in known or unit[at] in known]
        return [unit[start:end] for start, end in zip([0, *cuts], [*cuts, len(unit)], strict=True)]

    def _compile(self, tokens: Iterable[str]) -> Callable[[str], list[str]] | None:
        if self._unknown_fuses and SPACE not in self._known:
            return None
        across = self._across(tokens)
        if across is None:
            return None
        used = set().union(*self._pairs)
        alone = self._members(char for char in _ALONE if char not in used)
        letters = self._members(ascii_letters)
        signs = self._members(char for char in punctuation + digits if char not in alone)
        if any(a + b in self._pairs or b + a in self._pairs for a in letters for b in signs):
            letters, signs = "", ""
        run = "|".join(f"[{re.escape(chars)}]++" for chars in (letters, signs) if chars)
        run = f"(?:{run})?+" if run else ""
        others = f"[^{re.escape(SPACE + alone + letters + signs)}]++"
        more = "|".join([others, *across])
        alone = f"[{re.escape(alone)}]|" if alone else ""
        return re.compile(f"{alone}{SPACE}*+{run}(?:(?:{more}){run})*+").findall

    def _members(self, chars: Iterable[str]) -> str:
        """Those that are tokens, where unknown ones fuse with their neighbours."""
        return "".join(c for c in chars if c in self._known or not self._unknown_fuses)

    def _across(self, tokens: Iterable[str]) -> list[str] | None:
        """Patterns of each U+2581 that a token has after something else. None if too many."""
        pairs = [p for p in self._pairs if p[1] == SPACE and p[0] != SPACE]
        if len(pairs) > _MAX_ACROSS:
            return None
        found = {token for token in tokens for pair in pairs if pair in token}
        if len(found) > _MAX_ACROSS:
            return None
        return [
            f"(?<={re.escape(token[: match.start()])}){SPACE}(?={re.escape(token[match.end() :])})"
            f"{SPACE}*+"
            for token in sorted(found)
            for match in re.finditer(f"(?<=[^{SPACE}]){SPACE}", token)
        ]
