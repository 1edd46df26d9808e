r"""A pattern of a tokenizer.json, for Oniguruma, as one of `regex` that finds the same.

The two differ in much: what `^`, `$` and `\w` mean, ignoring case, sets in sets,
`{1,3}+`, the version of Unicode. What is written with the few means below means the
same in both, once classes are spelled out; anything else is refused.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import regex

from headrace.errors import StartupError
from services.tokenizer.backends import unicode_tables as tables

_NEW = tables.ranges(tables.NEW)
_CLASSES = {
    name: rf"[\p{{{name}}}--[{_NEW}]]"
    for name in ("L", "N", "M", "P", "S", "Lu", "Lt", "Lm", "Nd", "Han")
} | {
    "Ll": rf"[[\p{{Ll}}{tables.CASED}]--[{_NEW}]]",
    "Lo": rf"[\p{{Lo}}--[{_NEW}{tables.CASED}]]",
}
#: Ignoring case, as patterns do in English contractions: s has a third form.
_CASELESS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)": "(?:'(?:[sS\u017fdDmMtT]|[rR][eE]|[vV][eE]|[lL][lL]))",
    "(?i:[sdmt]|ll|ve|re)": "(?:[sS\u017fdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
}  # fmt: skip
_TOKEN = re.compile(
    r"""
    (?P<caseless>\(\?i:[^()]*\))
    | \\p\{(?P<klass>\w+)\}
    | (?P<escape>\\(?:[rnts]|[^\w\s]))
    | (?P<nonspace>\\S)
    | (?P<set>\[\^?)
    | (?P<group>\(\?(?::|=|!)|\)|\|)
    | (?P<quantifier>(?:[?*+]|\{\d+(?:,\d*)?\}(?![?+]))(?P<mode>[?+]?))
    | (?P<end>\$)
    | (?P<literal>[^\\\[\](){}?*+|.^$])
    """,
    re.VERBOSE,
)
_MEMBER = re.compile(
    r"\\p\{(?P<klass>\w+)\}|(?P<escape>\\(?:[rnts]|[^\w\s]))|(?P<end>\])|(?P<literal>[^\\\[\]])"
)


def translate(pattern: str, source: str) -> Any:
    """The compiled pattern. Raises StartupError if it can't be known to find the same."""
    found: list[str] = []
    at = 0
    while at < len(pattern):
        match = _TOKEN.match(pattern, at)
        if match is None:
            _refuse(pattern, at, source)
        at = match.end()
        if match["caseless"] is not None:
            if match["caseless"] not in _CASELESS:
                _refuse(pattern, match.start(), source)
            found.append(_CASELESS[match["caseless"]])
        elif match["klass"] is not None:
            found.append(_klass(match["klass"], pattern, match.start(), source))
        elif match["end"] is not None:
            # Of a line, in Ruby's syntax, without any option.
            found.append(r"(?=\n|\Z)")
        elif match["set"] is not None:
            at = _translate_set(pattern, at, found, match["set"], source)
        else:
            found.append(match[0])
    try:
        compiled = regex.compile("".join(found), regex.V1)
    except regex.error as error:
        raise StartupError(f"{source}: the pattern {pattern!r} is malformed: {error}") from error
    if compiled.match("") is not None:
        raise StartupError(f"{source}: the pattern {pattern!r} matches nothing at all")
    return compiled


def _translate_set(pattern: str, at: int, found: list[str], opening: str, source: str) -> int:
    """Append the set whose members begin at `at`; return where it ends."""
    found.append(opening)
    while True:
        match = _MEMBER.match(pattern, at)
        if match is None:
            _refuse(pattern, at, source)
        at = match.end()
        if match["klass"] is not None:
            found.append(_klass(match["klass"], pattern, match.start(), source))
        elif match["end"] is not None:
            if found[-1] == opening:
                _refuse(pattern, match.start(), source)
            found.append("]")
            return at
        elif match["literal"] is not None and match["literal"] in "&|~":
            # Doubled they would be operators.
            found.append("\\" + match[0])
        else:
            found.append(match[0])
        if match["literal"] is not None and match[0] in "-&" and pattern[at : at + 1] == match[0]:
            _refuse(pattern, at, source)


def _klass(name: str, pattern: str, at: int, source: str) -> str:
    return _CLASSES[name] if name in _CLASSES else _refuse(pattern, at, source)


def _refuse(pattern: str, at: int, source: str) -> NoReturn:
    raise StartupError(
        f"{source}: the pattern {pattern!r} is not supported: its {pattern[at : at + 8]!r} "
        "could mean something else here"
    )
