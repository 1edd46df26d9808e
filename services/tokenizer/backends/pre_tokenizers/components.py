"""The components of a tokenizer.json's `pre_tokenizer`, as Words.

Those that the table of known ones has become its fast forms; any other sequence is
done step by step, each cutting the pieces that the one before left.
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import regex

from headrace.errors import StartupError
from services.tokenizer.backends import unicode_tables as tables
from services.tokenizer.backends.pre_tokenizers.known import PRE_TOKENIZERS, split
from services.tokenizer.backends.pre_tokenizers.patterns import translate
from services.tokenizer.backends.pre_tokenizers.windows import (
    LETTERS,
    PLAIN_LETTERS,
    SPACES,
    windows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from services.tokenizer.backends.base import Words

    Step = Callable[[str], list[str]]
    Finder = Any

_META = "\u2581"
#: Options that change no ids, or that are read elsewhere.
_IGNORED = ("trim_offsets", "str_rep", "add_prefix_space", "prepend_scheme")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ByteLevel": {"use_regex": True},
    "Split": {"invert": False},
    "Punctuation": {"behavior": "Isolated"},
    "Digits": {"individual_digits": False},
    "Metaspace": {"split": True, "replacement": _META},
}
_BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


class Steps:
    """Step after step. Implements Words."""

    def __init__(self, steps: Sequence[Step], boundary: Any) -> None:
        self._steps = steps
        self._boundary = boundary

    def words(self, text: str, window_len: int | None = None) -> Iterator[list[str]]:
        """The words of `text`, in order, some at a time."""
        for window in windows(text, self._boundary, window_len):
            pieces = [window]
            for step in self._steps:
                pieces = [piece for whole in pieces for piece in step(whole) if piece]
            yield pieces


def from_pattern(pattern: str, source: str) -> Words:
    """The words are the matches of one pattern, as a rank file has it."""
    return from_components([split(pattern), {"type": "ByteLevel", "use_regex": False}], source)


def from_components(components: Sequence[dict[str, Any]], source: str) -> Words:
    """Raises StartupError naming a component that is not known."""
    short = tuple(_shortest(component, source) for component in components)
    for entry in PRE_TOKENIZERS.values():
        if _essence(short) == _essence(entry.huggingface):
            entry.compile()
            return entry
    steps = [step for component in short for step in _STEPS[component["type"]](component, source)]
    return Steps(steps, _boundary(short))


def _boundary(components: Sequence[dict[str, Any]]) -> Any:
    """Where a text may be cut before all these steps cut it."""
    kinds = {component["type"] for component in components}
    if "Split" in kinds:
        return PLAIN_LETTERS if _essence(components) in _CHECKED else None
    if "WhitespaceSplit" in kinds or {"type": "Metaspace"} in components:
        return SPACES
    # Digits and Punctuation cut at no spaces; these do, whatever stands before them.
    cuts = {"type": "ByteLevel"} in components or "BertPreTokenizer" in kinds
    return LETTERS if cuts else None


def _shortest(component: dict[str, Any], source: str) -> dict[str, Any]:
    kind = component.get("type")
    if kind not in _STEPS:
        _fail(source, component, "not supported")
    short = {key: value for key, value in component.items() if key not in _IGNORED}
    for key, value in _DEFAULTS.get(kind, {}).items():
        if short.get(key, value) == value:
            short.pop(key, None)
    return short


def _essence(components: Sequence[dict[str, Any]]) -> str:
    """Equal for those that give equal words."""
    parts = []
    for component in components:
        # What matches all of a text leaves nothing to remove between.
        covers = component.get("behavior") == "Removed" and component.get("invert")
        if covers and _covers(component):
            component = {**component, "behavior": "Isolated"}
            del component["invert"]
        parts.append(component)
    return json.dumps(parts, sort_keys=True)


def _covers(component: dict[str, Any]) -> bool:
    """Whether the pattern is a known one that leaves no character out."""
    pattern = component["pattern"].get("Regex")
    known = (PRE_TOKENIZERS[name] for name in ("llama3", "qwen2", "o200k", "tekken"))
    return any(pattern == entry.huggingface[0]["pattern"]["Regex"] for entry in known)


def _split(component: dict[str, Any], source: str) -> list[Step]:
    unknown = component.keys() - {"type", "pattern", "behavior", "invert"}
    behavior, pattern = component.get("behavior"), component.get("pattern")
    if unknown or behavior not in _BEHAVIORS or not isinstance(pattern, dict):
        _fail(source, component, "malformed")
    if "String" in pattern:
        if not pattern["String"]:
            _fail(source, component, "malformed")
        finder: Finder = re.compile(re.escape(pattern["String"]))
    else:
        finder = translate(pattern["Regex"], source)
    return [partial(_cut, finder, behavior, bool(component.get("invert")))]


def _byte_level(component: dict[str, Any], source: str) -> list[Step]:
    if component.get("use_regex", True):
        gpt2 = PRE_TOKENIZERS["gpt2"]
        return [lambda text: [word for words in gpt2.words(text) for word in words]]
    return []


def _digits(component: dict[str, Any], source: str) -> list[Step]:
    behavior = "Isolated" if component.get("individual_digits") else "Contiguous"
    return [partial(_cut, _DIGIT, behavior, False)]


def _punctuation(component: dict[str, Any], source: str) -> list[Step]:
    behavior = component.get("behavior", "Isolated")
    if behavior not in _BEHAVIORS:
        _fail(source, component, "malformed")
    return [partial(_cut, _PUNCTUATION, behavior, False)]


def _metaspace(component: dict[str, Any], source: str) -> list[Step]:
    if component.get("replacement", _META) != _META:
        _fail(source, component, "not supported")
    steps: list[Step] = [lambda text: [text.replace(" ", _META)]]
    if component.get("each_word"):
        steps.append(lambda text: [text if text.startswith(_META) else _META + text])
    if component.get("split", True):
        steps.append(_META_WORD.findall)
    return steps


def _whitespace_split(component: dict[str, Any], source: str) -> list[Step]:
    return [_NO_SPACE.findall]


def _bert(component: dict[str, Any], source: str) -> list[Step]:
    return [_bert_words]


def _bert_words(text: str) -> list[str]:
    return _ASCII_WORD.findall(text) if text.isascii() else _BERT_WORD.findall(text)


_STEPS: dict[str, Callable[[dict[str, Any], str], list[Step]]] = {
    "Split": _split,
    "ByteLevel": _byte_level,
    "Digits": _digits,
    "Punctuation": _punctuation,
    "Metaspace": _metaspace,
    "WhitespaceSplit": _whitespace_split,
    "BertPreTokenizer": _bert,
}

# `regex` knows these three classes in a newer Unicode than `tokenizers`.
_DIGIT = regex.compile(rf"[\p{{N}}--[{tables.ranges(tables.NO_DIGITS)}]]", regex.V1)
_SIGN = (
    rf"[[\p{{P}}$+<=>\^`\|\~{tables.ranges(tables.MORE_PUNCTUATION)}]"
    rf"--[{tables.ranges(tables.NO_PUNCTUATION)}]]"
)
_PUNCTUATION = regex.compile(_SIGN, regex.V1)
_BERT_WORD = regex.compile(rf"[^\s{_SIGN}]++|{_SIGN}", regex.V1)
_ASCII_WORD = re.compile(r"[^\s!-/:-@\[-`{-~]++|[!-/:-@\[-`{-~]", re.ASCII)
# Python's \s takes some controls beside Unicode's white space.
_NO_SPACE = regex.compile(r"\S++")
_META_WORD = re.compile(f"{_META}[^{_META}]*+|[^{_META}]++")


def _cut(finder: Finder, behavior: str, invert: bool, text: str) -> list[str]:
    """`text` cut at the matches of `finder` (`tokenizers`, normalizer.rs, split)."""
    parts: list[tuple[str, bool]] = []
    end = 0
    for match in finder.finditer(text):
        if match.start() > end:
            parts.append((text[end : match.start()], invert))
        parts.append((match[0], not invert))
        end = match.end()
    if end < len(text):
        parts.append((text[end:], invert))
    if behavior == "Isolated":
        return [part for part, _ in parts]
    if behavior == "Removed":
        return [part for part, matches in parts if not matches]
    return _joined(parts, behavior)


def _joined(parts: list[tuple[str, bool]], behavior: str) -> list[str]:
    from_end = behavior == "MergedWithNext"
    found: list[str] = []
    before = False
    for at, (part, matches) in enumerate(reversed(parts) if from_end else parts):
        if behavior == "Contiguous":
            joins = at > 0 and matches == before
        else:
            joins = matches and not before and bool(found)
        if joins:
            found[-1] = part + found[-1] if from_end else found[-1] + part
        else:
            found.append(part)
        before = matches
    return found[::-1] if from_end else found


def _fail(source: str, component: dict[str, Any], why: str) -> NoReturn:
    raise StartupError(f"{source}: the pre_tokenizer {json.dumps(component)} is {why}")


_OLD_CJK = split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
_EACH_DIGIT = {"type": "Digits", "individual_digits": True}
_BYTES = {"type": "ByteLevel", "use_regex": False}
#: By the values of `tokenizer.ggml.pre`: what those models' tokenizer.json has.
GGUF_COMPONENTS: dict[str, tuple[dict[str, Any], ...]] = {
    "deepseek-coder": (
        split("[\r\n]"),
        split(r"\s?\p{L}+"),
        split(r"\s?\p{P}+"),
        _OLD_CJK,
        _EACH_DIGIT,
        _BYTES,
    ),
    "deepseek-llm": (
        split("[\r\n]"),
        split(rf"\s?[{tables.ranges(tables.DEEPSEEK_LETTERS)}]+"),
        split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
        split(r"\s+$"),
        _OLD_CJK,
        _EACH_DIGIT,
        _BYTES,
    ),
}
#: Those whose signs and spaces may stand together, unlike any letters.
_CHECKED = {_essence(components) for components in GGUF_COMPONENTS.values()}
