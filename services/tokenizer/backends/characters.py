"""From which symbols the merging of a word may start: whole characters, where that is exact.

A character of three bytes takes two merges to become its token, in every word
anew. They can be left out if in this word no pair that can merge has a part of a
character on one side of a border and what stands there on the other. For then
nothing happens to a character's bytes but their own merges, until it is whole; and
if they never become one token, then for good.

Once it is whole, its token may merge with others, and would have to wait for its
last own merge, of value R. So that it may start whole, no pair with that token has
a value up to R. (What merges elsewhere meanwhile has values up to R too, and so is
due before any pair with the token; or it comes later.) This is the character's,
and is remembered; the former is asked of each word.
"""

from __future__ import annotations

import re
import sys
from itertools import chain
from operator import and_
from typing import TYPE_CHECKING, TypeVar

from services.tokenizer.backends.merges import NONE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from services.tokenizer.backends.merges import Merges

_T = TypeVar("_T")

#: Kinds of tokens: one character of several bytes; one that ends within a character
#: that began before it; one that begins with a character that ends behind it.
_ONE_CHARACTER, _ENDS_WITHIN, _BEGINS_WITHIN = 1, 2, 4

#: Characters that are remembered, in each of three tables; about 200 bytes each.
_MAX_CHARS = 1 << 14


class Characters:
    """Words to symbols, for one vocabulary.

    `byte_ids` has the token of each byte, `tokens` the bytes of each token.
    """

    def __init__(
        self, merges: Merges, byte_ids: Sequence[int | None], tokens: Sequence[bytes]
    ) -> None:
        self._merges = merges
        self._byte_ids = byte_ids
        kinds = bytes(0 if token.isascii() else _kind(token) for token in tokens)
        #: Token of a character -> the least value of a pair with it.
        self._least: dict[int, int] = {}
        least = self._least
        straddling: dict[bytes, set[bytes]] = {}
        for left, right, value in merges:
            left_kind, right_kind = kinds[left], kinds[right]
            if not (left_kind or right_kind) or not _begins(tokens[right]):
                continue
            for kind, token_id in ((left_kind, left), (right_kind, right)):
                if kind & _ONE_CHARACTER:
                    least[token_id] = min(value, least.get(token_id, NONE))
            if left_kind & _ENDS_WITHIN or right_kind & _BEGINS_WITHIN:
                ends = straddling.setdefault(_last(tokens[left]), set())
                ends.add(_first(tokens[right]))
        self._straddles = _Straddles(straddling)
        self._symbols_of = _Remembered(self._symbols)

    def symbols(self, word: str) -> list[int]:
        """What the merging of `word` may start with."""
        if self._straddles.may_be_in(word):
            return self._of_bytes(word)
        return list(chain.from_iterable(map(self._symbols_of.__getitem__, word)))

    def _of_bytes(self, text: str) -> list[int]:
        table = self._byte_ids
        return [at for byte in text.encode() if (at := table[byte]) is not None]

    def _symbols(self, char: str) -> tuple[int, ...]:
        ids = self._of_bytes(char)
        steps = list(self._merges.trace(ids))
        merged = steps[-1][1] if steps else ids
        highest = max((value for value, _ in steps), default=-1)
        comes_late = len(merged) == 1 and self._least.get(merged[0], NONE) <= highest
        return tuple(ids if comes_late else merged)


class _Straddles:
    """The pairs that merge with a part of a character at their border.

    Their distinct left sides are numbered; a character's masks say which of these
    it ends with, and before which of these it may stand.
    """

    def __init__(self, straddling: dict[bytes, set[bytes]]) -> None:
        ends = {end: 1 << at for at, end in enumerate(straddling)}

        def left(char: bytes) -> int:
            return sum(ends.get(char[at:], 0) for at in range(len(char)))

        def right(char: bytes) -> int:
            heads = {char[: at + 1] for at in range(len(char))}
            return sum(ends[end] for end, starts in straddling.items() if starts & heads)

        self._lefts = _Remembered(lambda char: left(char.encode()))
        self._rights = _Remembered(lambda char: right(char.encode()))
        after_ascii = {s for end, starts in straddling.items() if end.isascii() for s in starts}
        others = {s for end, starts in straddling.items() if not end.isascii() for s in starts}
        ascii_ends = "".join(re.escape(end.decode()) for end in ends if end.isascii())
        #: Most words have no character that could be on the right of any.
        self._search = re.compile(
            rf"(?<=[{ascii_ends}\0])[{_class(after_ascii)}]|(?<=[^\0-\x7f])[{_class(others)}]"
        ).search

    def may_be_in(self, word: str) -> bool:
        """Whether some border in `word` may be inside of one."""
        if self._search(word) is None:
            return False
        lefts = map(self._lefts.__getitem__, word)
        return any(map(and_, lefts, map(self._rights.__getitem__, word[1:])))


class _Remembered(dict[str, _T]):
    """Character -> what `find` says of it, for a while."""

    def __init__(self, find: Callable[[str], _T]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, char: str) -> _T:
        if len(self) >= _MAX_CHARS:
            self.clear()
        found = self[char] = self._find(char)
        return found


def _kind(token: bytes) -> int:
    """Which of the kinds above a token is that is not ASCII."""
    first = _first(token)
    is_cut = len(first) < _char_len(first[0])
    whole = _ONE_CHARACTER if first == token and not is_cut and _begins(token) else 0
    ends_within = _ENDS_WITHIN if not _begins(_last(token)) else 0
    return whole | ends_within | (_BEGINS_WITHIN if is_cut else 0)


def _begins(token: bytes) -> bool:
    """Whether it begins where a character does."""
    return not token or token[0] & 0xC0 != 0x80


def _last(token: bytes) -> bytes:
    """Its last character, or what there is of it."""
    at = len(token) - 1
    while at > 0 and token[at] & 0xC0 == 0x80:
        at -= 1
    return token[at:]


def _first(token: bytes) -> bytes:
    """Its first character, or what there is of it."""
    at = 1
    while at < len(token) and token[at] & 0xC0 == 0x80:
        at += 1
    return token[:at]


def _char_len(lead: int) -> int:
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _class(starts: Iterable[bytes]) -> str:
    """The characters that begin with these bytes, as the inside of a set; NUL always."""
    parts = ["\0"]
    for start in starts:
        length = _char_len(start[0])
        missing = length - len(start)
        if missing < 0:
            # No character begins so.
            continue
        # The bits of a code point: RFC 3629, section 3.
        first = start[0] & (0x7F if length == 1 else 0x7F >> length)
        for byte in start[1:]:
            first = first << 6 | byte & 0x3F
        first <<= 6 * missing
        last = min(first + (1 << 6 * missing) - 1, sys.maxunicode)
        if first <= last:
            parts.append(f"{re.escape(chr(first))}-{re.escape(chr(last))}")
    return "".join(parts)
