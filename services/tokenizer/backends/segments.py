"""Text to segments: added tokens are taken out, the rest is normalized.

As Hugging Face's `tokenizers` does it: added tokens that are not `normalized` are
found in the text as it is; what lies between them is normalized; the others,
normalized themselves, are found in that. At each position the longest wins.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import regex

from headrace.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from services.tokenizer.backends.base import AddedToken, TokenizerSpec

#: Unicode's White_Space, as `tokenizers` strips it (Python's str.strip() takes more).
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008"
    "\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
#: A word character as UTS 18 has it, which is what `single_word` looks at.
_IS_WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]").match
#: Deeper patterns than this could exhaust the stack of the one who compiles them.
_MAX_DEPTH = 60


class Segment(NamedTuple):
    """Either an added token (`token_id` ≥ 0) or normalized `text` to be tokenized."""

    text: str
    token_id: int = -1


class Segmenter:
    """Cuts for one vocabulary. Raises StartupError for an added token that nothing can match."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._normalize = spec.normalizer
        self._prepend = spec.prepend_space
        self._spaces = (" ",) if spec.family == "byte_level_bpe" else ("\u2581", " ")
        # Where two have the same content the special one wins, then the first.
        added = sorted(spec.added, key=lambda token: not token.is_special)
        self._verbatim = _Finder((t.content, t) for t in added if not t.normalized)
        self._normalized = _Finder(self._patterns(added, spec))

    def segments(self, text: str, *, parse_added: bool = True) -> list[Segment]:
        """The segments of `text`, in order, none of them empty.

        `prepend_space` is already done. With `parse_added` false no added token is found.
        """
        segments = self._verbatim.split(text) if parse_added else [Segment(text)]
        normalize = self._normalize
        if normalize is not None:
            segments = [s if s.token_id >= 0 else Segment(normalize(s.text)) for s in segments]
        if parse_added and self._normalized:
            found: list[Segment] = []
            for segment in segments:
                found += (
                    [segment] if segment.token_id >= 0 else self._normalized.split(segment.text)
                )
            segments = found
        if self._prepend != "never":
            self._prepend_spaces(segments)
        return [s for s in segments if s.text]

    def _patterns(
        self, added: Iterable[AddedToken], spec: TokenizerSpec
    ) -> Iterator[tuple[str, AddedToken]]:
        # SentencePiece's does not do to a symbol what it does to a text.
        normalize = getattr(self._normalize, "token_text", self._normalize)
        for token in added:
            if token.normalized and token.content:
                content = normalize(token.content) if normalize else token.content
                if not content:
                    raise StartupError(
                        f"{spec.source}: the added token {token.content!r} is normalized to nothing"
                    )
                yield content, token

    def _prepend_spaces(self, segments: list[Segment]) -> None:
        # An added token's segment that came first ends what "first" means.
        end = len(segments) if self._prepend == "always" else 1
        for at, (text, token_id) in enumerate(segments[:end]):
            if token_id < 0 and text and not text.startswith(self._spaces):
                segments[at] = Segment(self._spaces[0] + text)


class _Finder:
    """Finds some added tokens."""

    def __init__(self, tokens: Iterable[tuple[str, AddedToken]]) -> None:
        self._tokens: dict[str, AddedToken] = {}
        for content, token in tokens:
            if content:
                self._tokens.setdefault(content, token)
        self._ids = {content: token.token_id for content, token in self._tokens.items()}
        self._pattern = re.compile(f"({any_of(list(self._tokens))})") if self._tokens else None
        self._is_plain = not any(
            t.single_word or t.lstrip or t.rstrip for t in self._tokens.values()
        )

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def split(self, text: str) -> list[Segment]:
        """The tokens in `text` and what lies between them."""
        if self._pattern is None:
            return [Segment(text)]
        if not self._is_plain:
            return list(self._split_with_flags(text))
        pieces = self._pattern.split(text)
        if len(pieces) == 1:
            return [Segment(text)]
        ids = self._ids
        return [
            Segment(piece, ids[piece] if at % 2 else -1) for at, piece in enumerate(pieces) if piece
        ]

    def _split_with_flags(self, text: str) -> Iterator[Segment]:
        """As `add_special_tokens` has it in `tokenizers` (added_vocabulary.rs, find_matches):
        what `rstrip` takes can be found again as a token, but `lstrip` takes nothing twice."""
        done = 0
        assert self._pattern is not None
        for match in self._pattern.finditer(text):
            start, end = match.span()
            token = self._tokens[match[0]]
            if token.single_word and (
                (start > 0 and _IS_WORD(text[start - 1]))
                or (end < len(text) and _IS_WORD(text[end]))
            ):
                continue
            if token.lstrip:
                start = max(len(text[:start].rstrip(WHITE_SPACE)), done)
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip(WHITE_SPACE))
            if done < start:
                yield Segment(text[done:start])
            yield Segment(match[0], token.token_id)
            done = end
        if done < len(text):
            yield Segment(text[done:])


def any_of(words: list[str]) -> str:
    """A pattern for the longest of `words`: a prefix tree, so that thousands cost
    no more than the letters of one."""
    try:
        return _tree(sorted(set(words)), _MAX_DEPTH)
    except RecursionError:
        return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def _tree(words: list[str], depth: int) -> str:
    if depth == 0:
        raise RecursionError
    is_optional = not words[0]
    rests: dict[str, list[str]] = {}
    for word in words[is_optional:]:
        rests.setdefault(word[0], []).append(word[1:])
    branches = []
    for first, rest in rests.items():
        # They are in order: what the first and the last share, all share.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(rest[0], rest[-1], strict=False))
        prefix = "".join(char for char, _ in same)
        tail = _tree([word[len(prefix) :] for word in rest], depth - 1) if any(rest) else ""
        branches.append(re.escape(first + prefix) + tail)
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if is_optional else "")
