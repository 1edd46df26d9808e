"""Chunks of a text before it is normalized.

Normalizing costs more than everything that follows. But normalizers of WordPiece's
and Unigram's models look at characters and their marks only, and their
pre-tokenizers cut at white space anyway: what lies between white space has the same
ids wherever it stands. So chunks are what a cache is asked for, and one that it
knows is not normalized at all.

    BertNormalizer       canonical decomposition and the order of marks do not reach
                         across a space, which is no mark; lower case, accents,
                         controls and Han go character by character
    SentencePiece's map  looks up grapheme clusters: a mark behind a space, or a sign
                         before it, makes one with it (`stands_alone`)

Which tokenizers are so their spec says (`has_local_chunks`); nothing here knows ids.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from collections.abc import Callable

#: What Python's str.split() takes for white space and `tokenizers` does not, or removes.
_ODD_SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"
#: Marks, and what other versions of Unicode may have for marks.
_RISKY = frozenset({"Mn", "Mc", "Me", "Cf", "Cn", "Co", "Cc"})
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
_clusters = regex.compile(r"\X").findall


class NotAlone(Exception):
    """A chunk that its neighbours could change: the text must be normalized as a whole."""


def split_at_white_space(text: str) -> list[str] | None:
    """The chunks between white space. None if Python's idea of that is not Unicode's here."""
    if any(odd in text for odd in _ODD_SPACES):
        return None
    return text.split()


def stands_alone(chunk: str) -> bool:
    """Whether no edge of a chunk that is not ASCII makes a grapheme cluster with a space."""
    first, last = chunk[0], chunk[-1]
    if unicodedata.category(first) in _RISKY or unicodedata.category(last) in _RISKY:
        return False
    return len(_clusters(f" {first}")) == 2 and len(_clusters(f"{last} ")) == 2


def ascii_form(normalize: Callable[[str], str] | None) -> Callable[[str], str] | None:
    """What `normalize` does to printable ASCII, if that is something simple."""
    normalized = _PRINTABLE if normalize is None else normalize(_PRINTABLE)
    if normalized == _PRINTABLE:
        return str
    return str.lower if normalized == _PRINTABLE.lower() else None
