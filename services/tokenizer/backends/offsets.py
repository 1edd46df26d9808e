"""Where in a text each of its tokens comes from, in Unicode code points.

    text ── added tokens | normalizer ──> normalized text ── ids, one after the other ──>
             └─ each character keeps the range of the text that it comes from ─┘

It takes the ids of an encoding as they are and follows them along the text again:
no merges and no scores are known here. Several times slower than encoding.

The convention is that of Hugging Face's `tokenizers` without `trim_offsets`: a
token covers all it comes from, its leading space included; one that is a part of
a character covers that character; a space that was put before the text covers the
text's first character. It differs where a normalizer makes one character of
several: here that covers all of them, there only some.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import regex

from services.tokenizer.backends.segments import WHITE_SPACE, Segment, Segmenter
from services.tokenizer.backends.token_texts import SPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from services.tokenizer.backends.base import AddedToken, TokenizerSpec
    from services.tokenizer.backends.token_texts import TokenTexts

Range = tuple[int, int]

#: What is normalized apart from the rest of a text: characters with their marks and runs
#: of white space, or if that is not enough, words.
_UNITS = (regex.compile(r"\s+(?!\p{M})|\X"), regex.compile(r"\s+|\S+"))
_SPACES = (" ", SPACE)
#: What stands beside a unit, so that it is not taken for a text's start or end: it must
#: compose with nothing.
_BESIDE = "."


class OffsetFinder:
    """For one vocabulary. Called from one thread."""

    def __init__(self, spec: TokenizerSpec, texts: TokenTexts) -> None:
        self._spec = spec
        self._pieces = texts.pieces
        self._added = {token.token_id: token for token in spec.added}
        plain = replace(spec, normalizer=None, prepend_space="never")
        verbatim = [token for token in spec.added if not token.normalized]
        self._verbatim = Segmenter(replace(plain, added=verbatim))
        self._normalized = Segmenter(replace(plain, added=_normalized_tokens(spec)))
        #: To know characters, and bytes, that are no tokens.
        self._short = frozenset(piece for piece in self._pieces if len(piece) <= 4)
        self._fuses_unk = spec.fuse_unk or spec.family == "unigram"

    def find(self, text: str, ids: Sequence[int], *, parse_added: bool = True) -> list[Range]:
        """Start and end for each of `ids`, which `text` was encoded to, nothing put around them.

        Raises ValueError if they are not the ids of `text`.
        """
        if ids and max(ids) >= len(self._pieces):
            raise ValueError(f"there is no token {max(ids)}")
        found: list[Range] = []
        for part in self._parts(text, parse_added=parse_added):
            if part.token_id >= 0:
                if len(found) >= len(ids) or ids[len(found)] != part.token_id:
                    raise ValueError(f"token {len(found)} is not {part.token_id}, as the text has")
                found.append((part.starts[0], part.ends[-1]))
                continue
            follow = self._words if self._spec.family == "wordpiece" else self._bytes
            for start, end in follow(part.text, ids, len(found)):
                found.append((part.starts[start], part.ends[end - 1]))
        if len(found) != len(ids):
            raise ValueError(f"the text has {len(found)} tokens, not {len(ids)}")
        return found

    def _parts(self, text: str, *, parse_added: bool) -> Iterator[_Part]:
        """The segments that a backend would be given, with where they come from."""
        whole = _Part(text, range(len(text)), range(1, len(text) + 1))
        prepend, index = self._spec.prepend_space, 0
        for outer in self._cut(whole, self._verbatim) if parse_added else [whole]:
            if outer.token_id >= 0:
                index += 1
                yield outer
                continue
            normalized = _normalize(outer, self._spec.normalizer)
            for part in self._cut(normalized, self._normalized) if parse_added else [normalized]:
                is_first, index = index == 0, index + 1
                if part.token_id < 0 and (prepend == "always" or (is_first and prepend == "first")):
                    part = self._with_space(part)
                yield part
            index += not normalized.text

    def _cut(self, part: _Part, segmenter: Segmenter) -> Iterator[_Part]:
        text, done, content_end = part.text, 0, 0
        for segment in segmenter.segments(text):
            if segment.token_id < 0:
                start, end = done, done + len(segment.text)
            else:
                start, content_end, end = self._added_range(text, segment, done, content_end)
            yield _Part(
                segment.text, part.starts[start:end], part.ends[start:end], segment.token_id
            )
            done = end

    def _added_range(
        self, text: str, segment: Segment, done: int, content_end: int
    ) -> tuple[int, int, int]:
        """Start, end of the content, and end of an added token, with the white space it takes."""
        token = self._added[segment.token_id]
        start = text.index(segment.text, content_end)
        content_end = end = start + len(segment.text)
        while token.lstrip and start > done and text[start - 1] in WHITE_SPACE:
            start -= 1
        while token.rstrip and end < len(text) and text[end] in WHITE_SPACE:
            end += 1
        return start, content_end, end

    def _with_space(self, part: _Part) -> _Part:
        spaces = _SPACES if self._is_sentencepiece else (" ",)
        if not part.text or part.text.startswith(spaces):
            return part
        starts, ends = [part.starts[0], *part.starts], [part.ends[0], *part.ends]
        return _Part(" " + part.text, starts, ends)

    # How ids follow normalized text. Ranges are of its characters.

    def _bytes(self, text: str, ids: Sequence[int], at: int) -> Iterator[Range]:
        """Families whose tokens' bytes are the text's, but for what they have no token for."""
        data = text.replace(SPACE, " ").encode() if self._is_sentencepiece else text.encode()
        char_of = _chars_of_bytes(text, data)
        done = 0
        while done < len(data):
            piece = self._pieces[ids[at]] if at < len(ids) else b""
            if piece and data.startswith(piece, done):
                end = done + len(piece)
            elif piece and ids[at] == self._spec.unk_id:
                following = self._pieces[ids[at + 1]] if at + 1 < len(ids) else b""
                end = self._unknown_end(data, done, following)
            elif not self._is_sentencepiece and data[done : done + 1] not in self._short:
                done += 1  # A byte that the vocabulary has no token for vanishes.
                continue
            else:
                end = self._scattered_end(data, done, piece, at)
            yield char_of[done], char_of[end - 1] + 1
            done, at = end, at + 1

    @property
    def _is_sentencepiece(self) -> bool:
        return self._spec.family in ("sentencepiece_bpe", "unigram")

    def _unknown_end(self, data: bytes, start: int, following: bytes) -> int:
        end = start
        while end < len(data):
            # Byte-level families know no characters.
            size = _char_len(data[end]) if self._is_sentencepiece else 1
            if end > start and (
                not self._fuses_unk
                or data[end : end + size] in self._short
                or (following and data.startswith(following, end))
            ):
                break
            end += size
        return end

    def _scattered_end(self, data: bytes, start: int, piece: bytes, at: int) -> int:
        """A token of what stands around bytes that vanished."""
        end = start
        for byte in piece:
            while data[end : end + 1] not in self._short and end < len(data) and data[end] != byte:
                end += 1
            if data[end : end + 1] != bytes([byte]):
                break
            end += 1
        else:
            if piece:
                return end
        raise ValueError(f"token {at} is not of the text")

    def _words(self, text: str, ids: Sequence[int], at: int) -> Iterator[Range]:
        """WordPiece: each word of the pre-tokenizer is unknown, or pieces of it in a row."""
        tokens, prefix = self._spec.tokens, self._spec.continuing_prefix
        cut = self._spec.pre_tokenizer
        done = 0
        for word in chain.from_iterable(cut.words(text) if cut else [[text]]):
            if not word or word.isspace():
                continue
            done = start = text.index(word, done)
            end = start + len(word)
            while done < end:
                token_id = ids[at] if at < len(ids) else -1
                token = tokens[token_id] if token_id >= 0 else ""
                if token_id == self._spec.unk_id and done == start:
                    size = len(word)
                else:
                    token = token.removeprefix(prefix) if done > start else token
                    size = len(token)
                    if not token or not text.startswith(token, done):
                        raise ValueError(f"token {at} is not of the text")
                yield done, done + size
                done, at = done + size, at + 1


class _Part:
    """Some normalized text, and where each of its characters begins and ends in the whole;
    or an added token."""

    __slots__ = ("ends", "starts", "text", "token_id")

    def __init__(
        self, text: str, starts: Sequence[int], ends: Sequence[int], token_id: int = -1
    ) -> None:
        self.text = text
        self.starts = starts
        self.ends = ends
        self.token_id = token_id


def _normalized_tokens(spec: TokenizerSpec) -> list[AddedToken]:
    """Those that are found in normalized text, as they are found there."""
    normalize = spec.normalizer or str
    return [
        replace(token, content=normalize(token.content), normalized=False)
        for token in spec.added
        if token.normalized and token.content
    ]


def _normalize(part: _Part, normalizer: Callable[[str], str] | None) -> _Part:
    text = part.text
    normalized = text if normalizer is None else normalizer(text)
    if normalizer is None or not text or normalized == text:
        return part
    for pattern in _UNITS:
        aligned = _collapsed(_aligned(pattern.findall(text), part, normalizer), normalized)
        if aligned is not None:
            return aligned
    size = len(normalized)
    return _Part(normalized, [part.starts[0]] * size, [part.ends[-1]] * size)


def _aligned(units: list[str], part: _Part, normalize: Callable[[str], str]) -> _Part:
    """Each unit normalized as it is between others; character by character, if that is
    the same. The text is the normalized one only if `units` can be looked at so."""
    inside = _Inside(normalize)
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    done, last = 0, len(units) - 1
    for index, unit in enumerate(units):
        step = 1
        some = inside[unit] if 0 < index < last else inside.apart(unit, index > 0, index < last)
        if len(some) < len(unit):
            step = len(unit)
        for start, piece in enumerate(some, done):
            starts += [part.starts[start]] * len(piece)
            ends += [part.ends[start + step - 1]] * len(piece)
        pieces += some
        done += len(unit)
    return _Part("".join(pieces), starts, ends)


def _collapsed(part: _Part, normalized: str) -> _Part | None:
    """`part` without the spaces that `normalized` lacks: what normalizes to spaces side by
    side may become one. None if that is not all in which they differ."""
    text = part.text
    if text == normalized:
        return part
    starts: list[int] = []
    ends: list[int] = []
    at = 0
    for char in normalized:
        while at < len(text) and text[at] != char and text[at] in _SPACES:
            at = _join(part, at, normalized, ends)
        if text[at : at + 1] != char:
            return None
        starts.append(part.starts[at])
        ends.append(part.ends[at])
        at += 1
    while at < len(text) and text[at] in _SPACES:
        at = _join(part, at, normalized, ends)
    return None if at < len(text) else _Part(normalized, starts, ends)


def _join(part: _Part, at: int, normalized: str, ends: list[int]) -> int:
    """Let the space before it, if there is one, cover the space at `at` too."""
    if ends and normalized[len(ends) - 1] in _SPACES:
        ends[-1] = part.ends[at]
    return at + 1


class _Inside(dict[str, list[str]]):
    """Unit inside a text -> what it is normalized to, character by character or as a whole."""

    def __init__(self, normalize: Callable[[str], str]) -> None:
        super().__init__()
        self._normalize = normalize
        #: What a normalizer that puts something before a text makes of _BESIDE.
        self._before = normalize(_BESIDE)

    def __missing__(self, unit: str) -> list[str]:
        self[unit] = some = self.apart(unit, True, True)
        return some

    def apart(self, unit: str, has_left: bool, has_right: bool) -> list[str]:
        """The same for a unit that may be the text's first or last."""
        whole = self._one(unit, has_left, has_right)
        if len(unit) == 1:
            return [whole]
        end = len(unit) - 1
        some = [
            self._one(char, has_left or at > 0, has_right or at < end)
            for at, char in enumerate(unit)
        ]
        return some if "".join(some) == whole else [whole]

    def _one(self, text: str, has_left: bool, has_right: bool) -> str:
        left, right = _BESIDE if has_left else "", _BESIDE if has_right else ""
        normalized = self._normalize(left + text + right)
        return normalized.removeprefix(self._before if left else "").removesuffix(right)


def _char_len(lead: int) -> int:
    return 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _chars_of_bytes(text: str, data: bytes) -> Sequence[int]:
    if len(text) == len(data):
        return range(len(text))
    at, chars = -1, []
    for byte in data:
        at += byte & 0xC0 != 0x80
        chars.append(at)
    return chars
