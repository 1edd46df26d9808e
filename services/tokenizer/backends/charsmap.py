"""SentencePiece's precompiled map of characters: what strings become before tokenizing.

A blob of a length, a double array (darts-clone's format) whose keys are strings in
UTF-8, and their replacements, each ended by a zero byte. Two ways to use it: that
of `sentencepiece`, which replaces the longest key at each position, and that of
`tokenizers`, which replaces what a grapheme begins with by the shortest.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

import regex

from headrace.errors import StartupError
from services.tokenizer.backends import unicode_tables as tables
from services.tokenizer.backends.segments import any_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_LABEL = (1 << 31) | 0xFF
#: Graphemes of more bytes are looked up character by character (`tokenizers`).
_MAX_GRAPHEME_LEN = 5
#: Graphemes that are remembered.
_MAX_CACHED = 1 << 16
_GRAPHEMES = regex.compile(r"\X").findall
# Those of its day that `tokenizers` cuts graphemes by are marks for both.
_MARKS = "1ACF-1ADD 1AE0-1AEB 10EFA-10EFB 11B60-11B67 1E6E3 1E6E6 1E6EE-1E6EF 1E6F5"
_ODD = tables.stand_ins_of(
    dict.fromkeys(tables.characters(tables.NEW) - tables.characters(_MARKS), "\u0378")
)


def read_charsmap(blob: bytes, source: str) -> dict[str, str]:
    """Key -> replacement. Raises StartupError if the blob is damaged."""
    if not blob:
        return {}
    try:
        (length,) = struct.unpack_from("<I", blob)
        units = struct.unpack_from(f"<{length // 4}I", blob, 4)
        texts = blob[4 + length :]
        return {
            key.decode(): texts[at : texts.index(0, at)].decode() for key, at in _entries(units)
        }
    except (struct.error, ValueError, IndexError) as error:
        raise StartupError(f"{source}: the precompiled charsmap is malformed: {error}") from error


def _entries(units: tuple[int, ...]) -> Iterable[tuple[bytes, int]]:
    """The keys of a double array and their values.

    A unit at `base ^ label` is a child of the node with that base if it bears that label.
    """
    children: dict[int, list[int]] = {}
    for at, unit in enumerate(units):
        label = unit & _LABEL
        if 0 < label < 256:
            children.setdefault(at ^ label, []).append(at)
    nodes = [(_offset(units[0]), b"")]
    while nodes:
        base, key = nodes.pop()
        for at in children.get(base, ()):
            unit = units[at]
            below = at ^ _offset(unit)
            longer = key + bytes([unit & 0xFF])
            if unit >> 8 & 1:
                yield longer, units[below] & 0x7FFFFFFF
            nodes.append((below, longer))


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 1 << 9) >> 6)


def longest_first(mapped: dict[str, str], kept: Iterable[str] = ()) -> Callable[[str], str]:
    """As `sentencepiece` does it; the strings `kept` stay as they are."""
    single = {ord(key): text for key, text in mapped.items() if len(key) == 1}
    several = {key: text for key, text in mapped.items() if len(key) > 1}
    kept = [symbol for symbol in kept if symbol]
    parts = [any_of(words) for words in (kept, [*several]) if words]
    if not parts:
        return lambda text: text.translate(single)
    find = re.compile(f"({'|'.join(parts)})").split
    several |= {symbol: symbol for symbol in kept}

    def apply(text: str) -> str:
        pieces = find(text)
        pieces[::2] = [piece.translate(single) for piece in pieces[::2]]
        pieces[1::2] = [several[piece] for piece in pieces[1::2]]
        return "".join(pieces)

    return apply


def by_grapheme(mapped: dict[str, str]) -> Callable[[str], str]:
    """As `tokenizers` does it (normalizers/precompiled.rs and the crate spm_precompiled)."""
    single = {ord(key): text for key, text in mapped.items() if len(key) == 1}
    lengths = sorted({len(key) for key in mapped})
    cache: dict[str, str] = {}

    def replace(grapheme: str) -> str:
        if len(grapheme) > 1 and len(grapheme.encode()) <= _MAX_GRAPHEME_LEN:
            for length in lengths:
                found = mapped.get(grapheme[:length])
                if found is not None:
                    return found
        return grapheme.translate(single)

    def apply(text: str) -> str:
        if text.isascii() and "\r\n" not in text:
            return text.translate(single)
        found: list[str] = []
        for grapheme in _graphemes(text):
            replaced = cache.get(grapheme)
            if replaced is None:
                replaced = replace(grapheme)
                if len(grapheme) <= _MAX_GRAPHEME_LEN:
                    if len(cache) >= _MAX_CACHED:
                        cache.clear()
                    cache[grapheme] = replaced
            found.append(replaced)
        return "".join(found)

    return apply


def _graphemes(text: str) -> list[str]:
    plain = _ODD(text)
    graphemes: list[str] = _GRAPHEMES(plain)
    if plain is text:
        return graphemes
    found, end = [], 0
    for grapheme in graphemes:
        start, end = end, end + len(grapheme)
        found.append(text[start:end])
    return found
