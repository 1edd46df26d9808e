"""What a text goes through before it is cut: the normalizers of a tokenizer.json.

Each is a function from text to text; what is not known is a StartupError that
names it. Exactness is measured by `tokenizers`, whose tables are of other versions
of Unicode than Python's (`unicode_tables`).
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import regex

from headrace.errors import StartupError
from services.tokenizer.backends import unicode_tables as tables
from services.tokenizer.backends.charsmap import by_grapheme, longest_first, read_charsmap
from services.tokenizer.backends.pre_tokenizers.patterns import translate
from services.tokenizer.backends.segments import WHITE_SPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Normalizer = Callable[[str], str]

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
_META = "\u2581"

_UNNORMALIZED = tables.characters(tables.UNNORMALIZED)
_MAYBE_UNNORMALIZED = tables.search_of(_UNNORMALIZED)
_UNNORMALIZED_ONE = re.compile(f"([{tables.ranges(tables.UNNORMALIZED)}])")
_NEW_LOWER = tables.search_of(map(chr, tables.LOWER))
_ACCENTS = regex.compile(
    rf"[[\p{{M}}--[{tables.ranges(tables.NO_ACCENTS)}]]{tables.ranges(tables.MORE_ACCENTS)}]",
    regex.V1,
)
_BERT_ACCENTS = regex.compile(
    rf"[[\p{{Mn}}--[{tables.ranges(tables.NO_BERT_ACCENTS)}]]"
    rf"{tables.ranges(tables.MORE_BERT_ACCENTS)}]",
    regex.V1,
)
_BERT_DROPPED = re.compile(
    "["
    + tables.ranges(
        "0-8 B-C E-1F 7F-9F AD 600-605 61C 6DD 70F 180E 200B-200F 202A-202E 2060-2064 2066-206F "
        "E000-F8FF FEFF FFF9-FFFB FFFD 110BD 1BCA0-1BCA3 1D173-1D17A E0001 E0020-E007F "
        "F0000-FFFFD 100000-10FFFD"
    )
    + "]+"
)
_BERT_SPACES = re.compile(f"[{WHITE_SPACE}]")
_BERT_HAN = re.compile(
    "["
    + tables.ranges("3400-4DBF 4E00-9FFF F900-FAFF 20000-2A6DF 2A700-2B81F 2B920-2CEAF 2F800-2FA1F")
    + "]"
)
_ASCII_CLEAN = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127)) | {9: " ", 10: " ", 13: " "}
_NMT = dict.fromkeys((*range(1, 9), 0xB, *range(0xE, 0x20), 0x7F, 0x8F, 0x9F)) | dict.fromkeys(
    (9, 0xA, 0xC, 0xD, 0x1680, *range(0x200B, 0x2010), 0x2028, 0x2029, 0x2581, 0xFEFF, 0xFFFD), " "
)


def from_component(component: dict[str, Any] | None, source: str) -> Normalizer | None:
    """The `normalizer` of a tokenizer.json. Raises StartupError naming what is not known."""
    steps = _steps(component, source)
    if not steps:
        return None
    return steps[0] if len(steps) == 1 else partial(_in_turn, steps)


def normalize(form: Form, text: str) -> str:
    """One of Unicode's normal forms, as of the version that `tokenizers` has."""
    if text.isascii():
        return text
    if _MAYBE_UNNORMALIZED(text) is None:
        return unicodedata.normalize(form, text)
    # What stands apart neither composes nor is ordered with anything.
    pieces = _UNNORMALIZED_ONE.split(text)
    pieces[::2] = [unicodedata.normalize(form, piece) for piece in pieces[::2]]
    return "".join(pieces)


def lower(text: str) -> str:
    """Lower case, each character for itself: a sigma is never a final one."""
    if text.isascii():
        return text.lower()
    if _NEW_LOWER(text) is not None:
        text = text.translate(tables.LOWER)
    return text.replace("\u03a3", "\u03c3").lower()


class SentencePiece:
    """The normalizer of a SentencePiece model (sentencepiece, src/normalizer.cc).

    `token_text` says how a user-defined symbol looks in what this makes of a text.
    """

    def __init__(
        self,
        charsmap: Mapping[str, str],
        symbols: Iterable[str] = (),
        *,
        adds_prefix: bool,
        removes_spaces: bool,
    ) -> None:
        symbols = list(symbols)
        self._map = longest_first(dict(charsmap), symbols) if charsmap else None
        self._prefix = _META if adds_prefix else ""
        self._removes_spaces = removes_spaces

    def __call__(self, text: str) -> str:
        if self._map is not None:
            text = self._map(text)
        if self._removes_spaces:
            text = re.sub("  +", " ", text).lstrip(" ")
        if not text:
            return ""
        text = self._prefix + text.replace(" ", _META)
        return text.rstrip(_META) if self._removes_spaces else text

    def token_text(self, content: str) -> str:
        """`content` as it stands in a normalized text."""
        return content.replace(" ", _META)


def _in_turn(steps: list[Normalizer], text: str) -> str:
    for step in steps:
        text = step(text)
    return text


def _steps(component: dict[str, Any] | None, source: str) -> list[Normalizer]:
    if component is None:
        return []
    kind = component.get("type")
    if kind == "Sequence":
        return [s for part in component["normalizers"] for s in _steps(part, source)]
    if kind not in _KINDS:
        _fail(source, component, "not supported")
    options = {key: value for key, value in component.items() if key != "type"}
    unknown = options.keys() - _OPTIONS.get(kind, frozenset())
    if unknown:
        _fail(source, component, f"not supported: it has {', '.join(sorted(unknown))}")
    return [_KINDS[kind](options, source)]


def _form(form: Form) -> Callable[[dict[str, Any], str], Normalizer]:
    return lambda options, source: partial(normalize, form)


def _strip_accents(text: str) -> str:
    return text if text.isascii() else _ACCENTS.sub("", text)


def _strip(options: dict[str, Any], source: str) -> Normalizer:
    left, right = options.get("strip_left", True), options.get("strip_right", True)

    def strip(text: str) -> str:
        text = text.lstrip(WHITE_SPACE) if left else text
        return text.rstrip(WHITE_SPACE) if right else text

    return strip


def _replace(options: dict[str, Any], source: str) -> Normalizer:
    pattern, content = options["pattern"], options["content"]
    if "String" in pattern:
        if not pattern["String"]:
            _fail(source, options, "malformed")
        old = pattern["String"]
        return lambda text: text.replace(old, content)
    compiled = translate(pattern["Regex"], source)
    return lambda text: compiled.sub(lambda _: content, text)


def _prepend(options: dict[str, Any], source: str) -> Normalizer:
    prefix = options["prepend"]
    return lambda text: prefix + text if text else text


def _precompiled(options: dict[str, Any], source: str) -> Normalizer:
    return by_grapheme(read_charsmap(base64.b64decode(options["precompiled_charsmap"]), source))


def bert(options: dict[str, Any], source: str = "") -> Normalizer:
    """BertNormalizer, with its options as in a tokenizer.json."""
    cleans, lowers = options.get("clean_text", True), options.get("lowercase", True)
    spaces_han = options.get("handle_chinese_chars", True)
    strips = options.get("strip_accents")
    strips = lowers if strips is None else strips

    def apply(text: str) -> str:
        if text.isascii():
            text = text.translate(_ASCII_CLEAN) if cleans else text
            return text.lower() if lowers else text
        if cleans:
            text = _BERT_SPACES.sub(" ", _BERT_DROPPED.sub("", text))
        if spaces_han:
            text = _BERT_HAN.sub(r" \g<0> ", text)
        if strips:
            text = _BERT_ACCENTS.sub("", normalize("NFD", text))
        return lower(text) if lowers else text

    return apply


_KINDS: dict[str, Callable[[dict[str, Any], str], Normalizer]] = {
    "NFC": _form("NFC"),
    "NFD": _form("NFD"),
    "NFKC": _form("NFKC"),
    "NFKD": _form("NFKD"),
    "Lowercase": lambda options, source: lower,
    "StripAccents": lambda options, source: _strip_accents,
    "Strip": _strip,
    "Replace": _replace,
    "Prepend": _prepend,
    "Precompiled": _precompiled,
    "BertNormalizer": bert,
    "Nmt": lambda options, source: lambda text: text.translate(_NMT),
}
_OPTIONS = {
    "Strip": {"strip_left", "strip_right"},
    "Replace": {"pattern", "content"},
    "Prepend": {"prepend"},
    "Precompiled": {"precompiled_charsmap"},
    "BertNormalizer": {"clean_text", "handle_chinese_chars", "strip_accents", "lowercase"},
}


def _fail(source: str, component: dict[str, Any], why: str) -> NoReturn:
    raise StartupError(f"{source}: the normalizer {json.dumps(component)[:300]} is {why}")
