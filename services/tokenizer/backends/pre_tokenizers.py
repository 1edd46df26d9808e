r"""How byte-level vocabularies cut text into words: the table.

A pattern is written once, with `{L}`, `{N}` and `{D}` for members of a character
class, and compiled three times, for three kinds of text:

    ASCII only                    `re`, the classes spelled out: twice as fast
    any                           `regex`, the classes by Unicode property
    with characters of _NEW_…     the same, with those taken out of the classes

The last exists because the `regex` module knows a newer Unicode than Hugging
Face's `tokenizers`, by which exactness is measured: what was assigned since is
no letter and no number there. A test compares all code points.

A pattern must match every character by some alternative, and choose it by looking
at no more than _REACH characters behind the word: `words` depends on both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import regex

if TYPE_CHECKING:
    from collections.abc import Iterator

# `\p{L}` and `\p{N}` that came after Unicode 16.0 (which `tokenizers`' patterns
# know), and the numbers that came after 17.0 (which its Digits splitter knows).
_NEW_LETTERS = """
    558 58B-58C 88F C5C CDC 208F 209D-209F A7CE-A7CF A7D2 A7D4 A7DD A7E2 A7F1 AB6C-AB6D
    107BB-107BF 10940-10959 10EC5-10EC7 10ED9-10EEE 11B0A 11DB0-11DDB 11DF1 16EA0-16EB8
    16EBB-16ED3 16FF2-16FF3 187F8-187FF 18CD6-18CDA 18D09-18D20 18D80-18DF2 18E00-19191
    191A0-191D2 1B123-1B128 1B168 1D6A6 1DF1F-1DF24 1DF2B-1DF81 1DF90-1DF96 1DFCD-1DFFF
    1E6C0-1E6DE 1E6E0-1E6E2 1E6E4-1E6E5 1E6E7-1E6ED 1E6F0-1E6F4 1E6FE-1E6FF 2B73A-2B73F
    2B81E 2CEA2-2CEAD 323B0-33479 3D000-3FC3F
"""
_NEW_DIGITS = "1246F 12475-1247F 12550-12686"
_NEW_NUMBERS = f"11DE0-11DE9 16FF4-16FF6 {_NEW_DIGITS}"

#: Characters of text that are cut at a time, so that a long text's words are not
#: all in memory at once.
WINDOW_LEN = 1 << 16
#: What follows a word decides on it no further than this: "'" is a word, unless
#: "re" follows.
_REACH = 3


@dataclass(frozen=True)
class PreTokenizer:
    """How text becomes words, and by which names files ask for it."""

    pattern: str
    #: Values of `tokenizer.ggml.pre`.
    gguf: tuple[str, ...]
    #: The components of a tokenizer.json's `pre_tokenizer`, options at their
    #: defaults left out.
    huggingface: tuple[dict[str, Any], ...]

    def words(self, text: str, window_len: int = WINDOW_LEN) -> Iterator[list[str]]:
        """The words of `text`, in order, some at a time; together they are the text.

        What lies at a window's end may go on behind it, and is left to the next:

            | word | word | word | wo|rd | …
            start                cut end
        """
        find = self._patterns_for(text).findall
        start, length = 0, window_len
        while start < len(text):
            end = start + length
            words: list[str] = find(text, start, end)
            cut = end
            while words and end < len(text) and end - cut < _REACH:
                cut -= len(words.pop())
            start = cut
            # A word longer than the window: look twice as far each time.
            length = window_len if words else 2 * length
            if words:
                yield words

    def _patterns_for(self, text: str) -> Any:
        if text.isascii():
            return self.ascii_pattern
        if _has_new(text):
            return self.exact_pattern
        return self.unicode_pattern

    @cached_property
    def ascii_pattern(self) -> re.Pattern[str]:
        """For ASCII text only."""
        return re.compile(_fill(self.pattern, L="A-Za-z", N="0-9", D="0-9"), re.ASCII)

    @cached_property
    def unicode_pattern(self) -> Any:
        """For text without the characters of the lists above."""
        return regex.compile(_fill(self.pattern, L=r"\p{L}", N=r"\p{N}", D=r"\p{N}"))

    @cached_property
    def exact_pattern(self) -> Any:
        """For any text."""
        classes = {
            "L": rf"[\p{{L}}--[{_ranges(_NEW_LETTERS)}]]",
            "N": rf"[\p{{N}}--[{_ranges(_NEW_NUMBERS)}]]",
            "D": rf"[\p{{N}}--[{_ranges(_NEW_DIGITS)}]]",
        }
        return regex.compile(_fill(self.pattern, **classes), regex.V1)

    def compile(self) -> None:
        """Compile all patterns now, once for all processes forked later."""
        _ = self.ascii_pattern, self.unicode_pattern, self.exact_pattern


def _fill(pattern: str, **classes: str) -> str:
    for name, members in classes.items():
        pattern = pattern.replace(f"{{{name}}}", members)
    return pattern


def _ranges(listed: str) -> str:
    """`558 58B-58C` as the inside of a character set."""
    ends = [[chr(int(end, 16)) for end in part.split("-")] for part in listed.split()]
    return "".join("-".join(part) for part in ends)


# Whatever lies outside the basic plane passes for new here: a search for few and
# wide ranges is several times faster.
_in_basic_plane = [p for p in f"{_NEW_LETTERS} {_NEW_NUMBERS}".split() if len(p.split("-")[0]) < 5]
_has_new = re.compile(f"[{_ranges(' '.join(_in_basic_plane))}\U00010000-\U0010ffff]").search

_CONTRACTIONS = "'(?:[stmd]|re|ve|ll)"

#: Name -> how it cuts. The order of alternatives that can't begin with the same
#: character is free: the commonest stands first.
PRE_TOKENIZERS = {
    "gpt2": PreTokenizer(
        rf" ?[{{L}}]++| ?[{{N}}]++|{_CONTRACTIONS}| ?[^\s{{L}}{{N}}]++|\s+(?!\S)|\s+",
        gguf=("gpt-2",),
        huggingface=({"type": "ByteLevel"},),
    ),
    # Digits stand alone and end what is before them, white space too.
    "smollm": PreTokenizer(
        rf" ?[{{L}}]++|[{{D}}]|{_CONTRACTIONS}| ?[^\s{{L}}{{N}}{{D}}]++|\s+(?![^\s{{D}}])|\s+",
        gguf=("smollm",),
        huggingface=({"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}),
    ),
}
