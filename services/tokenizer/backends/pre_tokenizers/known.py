r"""The pre-tokenizers that models have, in a fast form: the table.

A pattern is written once, with `{L}` and the like for the inside of a character
set, and compiled twice:

    ASCII only     `re`, the classes spelled out: twice as fast
    any            `regex`, the classes by Unicode property

The `regex` module knows a newer Unicode than `tokenizers`, by which exactness is
measured (`unicode_tables`): before the second looks at a text, characters that
`tokenizers` classifies otherwise are replaced, one for one, by some of their class
there, and the words are then taken out of the text as it was.

A pattern must match every character by some alternative and never look behind. The
order of alternatives that can't begin with the same character is free: the
commonest stands first.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import regex

from services.tokenizer.backends import unicode_tables as tables
from services.tokenizer.backends.pre_tokenizers.windows import LETTERS, windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Never assigned; of no class but "unassigned".
_UNASSIGNED = "\u0378"
_CJK = "\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"

#: `{L}` -> inside of a set of `regex`, categories whose ASCII members `re` gets.
_CLASSES = {
    "L": (r"\p{L}", ("Lu", "Ll")),
    "N": (r"\p{N}", ("Nd",)),
    # As the Digits splitter has them: `{N}` and a few more.
    "D": (r"\p{N}", ("Nd",)),
    "P": (r"\p{P}", ("Pc", "Pd", "Ps", "Pe", "Po")),
    "S": (r"\p{S}", ("Sc", "Sk", "Sm", "So")),
    # As the Punctuation splitter has it: ASCII's symbols too.
    "F": (r"\p{P}$+<=>^`|~", ("Pc", "Pd", "Ps", "Pe", "Po", "Sc", "Sk", "Sm")),
    "M": (r"\p{M}", ()),
    # What stands in a word's upper-case part, and in its lower-case part.
    "U": (r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", ("Lu",)),
    "W": (r"\p{Ll}\p{Lm}\p{Lo}\p{M}", ("Ll",)),
    "C": (_CJK, ()),
}


@dataclass(frozen=True)
class PreTokenizer:
    """How text becomes words, and by which names files ask for it. Implements Words."""

    name: str
    pattern: str
    #: Values of `tokenizer.ggml.pre`.
    gguf: tuple[str, ...]
    #: The components of a tokenizer.json's `pre_tokenizer`, each in its shortest form.
    huggingface: tuple[dict[str, Any], ...]
    #: For ASCII, where `re` can't say it in the same words.
    ascii: str = ""

    def words(self, text: str, window_len: int | None = None) -> Iterator[list[str]]:
        """The words of `text`, in order, some at a time; together they are the text."""
        for window in windows(text, LETTERS, window_len):
            if window.isascii():
                yield self.ascii_pattern.findall(window)
                continue
            plain = self._stand_ins(window)
            words = self.unicode_pattern.findall(plain)
            yield words if plain is window else _slices(window, words)

    @cached_property
    def ascii_pattern(self) -> re.Pattern[str]:
        """For ASCII text only."""
        pattern = self.ascii or self.pattern
        for name, (_, categories) in _CLASSES.items():
            members = [chr(i) for i in range(128) if unicodedata.category(chr(i)) in categories]
            pattern = pattern.replace(f"{{{name}}}", "".join(map(re.escape, members)))
        return re.compile(pattern, re.ASCII)

    @cached_property
    def unicode_pattern(self) -> Any:
        """For text without the characters of `_stand_ins`."""
        pattern = self.pattern
        for name, (members, _) in _CLASSES.items():
            pattern = pattern.replace(f"{{{name}}}", members)
        # Sets may be subtracted from each other.
        return regex.compile(pattern, regex.V1)

    @cached_property
    def _stand_ins(self) -> Callable[[str], str]:
        found = dict.fromkeys(tables.characters(tables.NEW), _UNASSIGNED)
        found[tables.CASED] = "\u0250"
        if "{D}" in self.pattern:
            for char in tables.characters(tables.NEW_DIGITS):
                del found[char]
        if "{F}" in self.pattern:
            found |= dict.fromkeys(tables.characters(tables.NO_PUNCTUATION), _UNASSIGNED)
            found |= dict.fromkeys(tables.characters(tables.MORE_PUNCTUATION), "\u2010")
        return tables.stand_ins_of(found)

    def compile(self) -> None:
        """Compile all now, once for all processes forked later."""
        _ = self.ascii_pattern, self.unicode_pattern, self._stand_ins


def _slices(text: str, words: list[str]) -> list[str]:
    """`text` cut into the lengths of `words`."""
    found, end = [], 0
    for word in words:
        start, end = end, end + len(word)
        found.append(text[start:end])
    return found


def split(pattern: str) -> dict[str, Any]:
    """The component that most files have: a pattern whose matches stand alone."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}


# Long s is an s when case does not matter.
_CONTRACTIONS = "'(?:[sS\u017fdDmMtT]|[rR][eE]|[vV][eE]|[lL][lL])"
_BYTES: dict[str, Any] = {"type": "ByteLevel", "use_regex": False}
_GPT2: dict[str, Any] = {"type": "ByteLevel"}
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _with_letters_apart(digits: str) -> tuple[str, tuple[dict[str, Any], ...]]:
    """cl100k's pattern, whose numbers have some digits or one: its fast form and its original."""
    fast = (
        rf" ?[{{L}}]++|{_CONTRACTIONS}|[^\r\n{{L}}{{N}}]?+[{{L}}]++|[{{N}}]{digits}"
        rf"| ?[^\s{{L}}{{N}}]++[\r\n]*|{_SPACE}"
    )
    original = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}"
    )
    return fast, (split(original), _BYTES)


def _with_case_apart(contractions: bool, digits: str) -> tuple[str, tuple[dict[str, Any], ...]]:
    """o200k's pattern, or Mistral's."""
    fast, original = ("", "")
    if contractions:
        fast, original = f"(?:{_CONTRACTIONS})?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    upper, lower = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
    start, other = r"[^\r\n\p{L}\p{N}]?", rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
    return (
        rf"[^\r\n{{L}}{{N}}]?[{{U}}]*[{{W}}]+{fast}|[^\r\n{{L}}{{N}}]?[{{U}}]+[{{W}}]*{fast}"
        rf"|[{{N}}]{digits}| ?[^\s{{L}}{{N}}]+[\r\n/]*|{_SPACE}",
        (
            split(
                rf"{start}[{upper}]*[{lower}]+{original}|{start}[{upper}]+[{lower}]*{original}"
                rf"|\p{{N}}{digits}{other}"
            ),
            _BYTES,
        ),
    )


_LLAMA3, _LLAMA3_JSON = _with_letters_apart("{1,3}")
_QWEN2, _QWEN2_JSON = _with_letters_apart("")
_O200K, _O200K_JSON = _with_case_apart(True, "{1,3}")
_TEKKEN, _TEKKEN_JSON = _with_case_apart(False, "")

# Three splits in a row: numbers and CJK end what is before them, white space too.
# The third cuts CJK once more, and what none of its alternatives matches (controls,
# mostly) stands together.
_CJK_LETTER = r"[[{L}{M}]&&[{C}]]"
_CJK_UNASSIGNED = r"[\u3040\u3097\u3098]"
_DEEPSEEK_V3 = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n{L}{P}{S}{N}{C}]?[[{L}{M}]--[{C}]]++"
    r"| ?[[{P}{S}]--[{C}]]++[\r\n]*|[{N}]{1,3}|\s*[\r\n]+|\s+(?![^\s{N}{C}])|\s+"
    rf"|{_CJK_UNASSIGNED}?{_CJK_LETTER}++|[[{{P}}{{S}}]&&[{{C}}]]++"
    rf"|(?:{_CJK_UNASSIGNED}(?!{_CJK_LETTER}))+"
    r"|(?:[^\s{L}{M}{P}{S}{N}{C}](?![[{L}{M}]--[{C}]]))+"
)
_DEEPSEEK_V3_ASCII = (
    r"[^\S\r\n]?+[{L}]++|[{P}{S}][{L}]+| ?[{P}{S}]++[\r\n]*|[{N}]{1,3}|\s*[\r\n]+"
    r"|\s+(?![^\s{N}])|\s+|[^\s{L}{P}{S}{N}][{L}]++|(?:[^\s{L}{P}{S}{N}](?![{L}]))+"
)
_ASCII_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK_V3_JSON = (
    split(r"\p{N}{1,3}"),
    split(f"[{_CJK}]+"),
    split(
        _ASCII_SIGNS + "[A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
    _BYTES,
)

#: Name -> how it cuts.
PRE_TOKENIZERS = {
    entry.name: entry
    for entry in (
        PreTokenizer(
            "gpt2",
            r" ?[{L}]++| ?[{N}]++|'(?:[stmd]|re|ve|ll)| ?[^\s{L}{N}]++|\s+(?!\S)|\s+",
            gguf=("gpt-2", "mpt"),
            huggingface=(_GPT2,),
        ),
        # Digits stand alone and end what is before them, white space too.
        PreTokenizer(
            "smollm",
            r" ?[{L}]++|[{D}]|'(?:[stmd]|re|ve|ll)| ?[^\s{L}{D}]++|\s+(?![^\s{D}])|\s+",
            gguf=("smollm", "starcoder", "refact", "command-r"),
            huggingface=({"type": "Digits", "individual_digits": True}, _GPT2),
        ),
        # Punctuation stands apart from what surrounds it; digits come in threes. The
        # file's Digits and Split see bytes, in GPT-2's letters, some of which pass for
        # digits: to cut there too changes no ids, since no merge joins those to others.
        PreTokenizer(
            "falcon",
            r" ?[{L}]++|[{F}]++|[0-9]{3}|[0-9]{1,2}| ?(?:(?![0-9])[{N}])++| ?[^\s{L}{N}{F}]++"
            r"|\s+(?![^\s{F}])|\s+",
            gguf=("falcon",),
            huggingface=(
                {"type": "Punctuation", "behavior": "Contiguous"},
                _GPT2,
                {"type": "Digits", "individual_digits": False},
                split("[0-9][0-9][0-9]"),
            ),
        ),
        PreTokenizer(
            "llama3",
            _LLAMA3,
            gguf=("llama-bpe", "llama3", "llama-v3"),
            huggingface=_LLAMA3_JSON,
        ),
        PreTokenizer("qwen2", _QWEN2, ("qwen2",), _QWEN2_JSON),
        PreTokenizer("o200k", _O200K, ("gpt-4o",), _O200K_JSON),
        PreTokenizer("tekken", _TEKKEN, ("tekken",), _TEKKEN_JSON),
        PreTokenizer(
            "deepseek_v3", _DEEPSEEK_V3, ("deepseek-v3",), _DEEPSEEK_V3_JSON, _DEEPSEEK_V3_ASCII
        ),
    )
}
