"""Unigram, as SentencePiece has it: XLM-R, e5, T5.

    text -> segments -> chunks between spaces -> normalizer -> words (they begin with
    U+2581) -> the tokens whose log probabilities sum up highest -> ids

A character that is no token has the worst token's score less 10, and those in a row
are one: their bytes' tokens with byte fallback, or else the unknown token. The best
path is found as `tokenizers` finds it (models/unigram, encode_optimized), sums in
float64 from the word's start, so that ties break alike. The `sentencepiece` library
sums in float32 over whole sentences: where two paths of different tokens are as
near as that, it can choose the other.

A word is cut where no token reaches across (see boundaries.py), and such units are
cached with their ids. Then sums begin anew, and are rounded otherwise: so a unit with
two paths that rounding could exchange is not cut out of its word. Where the normalizer
allows it, chunks of the text before it are cached, which need not be normalized again
(see raw_chunks.py).
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from operator import add, itemgetter
from typing import TYPE_CHECKING

from headrace.blocks import pack_tokens
from headrace.errors import StartupError
from services.tokenizer.backends.boundaries import Boundaries
from services.tokenizer.backends.raw_chunks import (
    NotAlone,
    ascii_form,
    split_at_white_space,
    stands_alone,
)
from services.tokenizer.backends.segments import Segmenter, any_of
from services.tokenizer.backends.token_texts import SPACE, sentencepiece_texts
from services.tokenizer.backends.word_cache import WordCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.tokenizer.backends.base import TokenizerSpec

#: What an unknown character scores less than the worst token (sentencepiece,
#: src/unigram_model.cc, kUnkPenalty).
_UNKNOWN_PENALTY = 10.0
#: Units of more characters are cut once more, by pairs of neighbours.
_MAX_UNIT_LEN = 16
#: Longer words are not cut: the longer, the more rounding.
_MAX_CUT_LEN = 2000
#: Two sums that are nearer can be exchanged by rounding in a word of _MAX_CUT_LEN: an
#: addition there errs by 2e-12 at most.
_MARGIN = 1e-6
_SPACES = f" {SPACE}"
#: Tokens up to this length are found together.
_SHORT_LEN = 3
#: Texts of that length that are remembered.
_MAX_SHORT = 1 << 15
#: In no token and no text: a surrogate.
_NOTHING = "\ud800"
_NEVER = float("-inf")
#: In place of an id: a character that is no token.
_UNKNOWN = -1


class Unigram:
    """One vocabulary. Implements Backend."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.vocab_size = len(spec.tokens)
        self.texts = sentencepiece_texts(spec)
        self._added = {token.token_id: pack_tokens([token.token_id]) for token in spec.added}
        self._normalize = spec.normalizer or str
        self._prepend = spec.prepend_space
        self._pre_tokenizer = spec.pre_tokenizer
        self._encode_whole = _UnitEncoder(spec)
        special = {token.token_id for token in spec.added}
        self._boundaries = Boundaries(
            [token for at, token in enumerate(spec.tokens) if token and at not in special],
            unknown_fuses=True,
        )
        #: Tokens of the model that the boundaries don't know.
        apart = [spec.tokens[at] for at in special if at < len(spec.scores)]
        self._find_special = re.compile(any_of(apart)).search if apart else lambda _: None
        # Without a pre-tokenizer there is no word that sums could begin with.
        self._max_cut_len = sys.maxsize if spec.pre_tokenizer is None else _MAX_CUT_LEN
        self._margin = 0.0 if spec.pre_tokenizer is None else _MARGIN
        self._units = WordCache(self._encode_unit)
        self._words = WordCache(self._encode_word)
        self._chunks: WordCache | None = None
        self._cuts_at_spaces_only = False
        if (
            spec.has_local_chunks
            and spec.pre_tokenizer is not None
            and not any(token.normalized for token in spec.added)
        ):
            self._ascii_form = ascii_form(spec.normalizer)
            #: What white space at a text's end leaves.
            self._tail = self._encode_normalized(self._normalize("a ").removeprefix("a"))
            self._chunks = WordCache(self._encode_chunk)
            cut = [word for words in spec.pre_tokenizer.words(" a-1.b a") for word in words]
            self._cuts_at_spaces_only = cut == [f"{SPACE}a-1.b", f"{SPACE}a"]
            spec = replace(spec, normalizer=None, prepend_space="never")
        self._segments = Segmenter(spec).segments

    def encode(self, text: str, *, parse_added: bool = True) -> bytes:
        """See Backend."""
        packed = []
        for at, segment in enumerate(self._segments(text, parse_added=parse_added)):
            if segment.token_id >= 0:
                packed.append(self._added[segment.token_id])
            elif self._chunks is None:
                packed.append(self._encode_normalized(segment.text))
            else:
                prepends = self._prepend == "always" or (self._prepend == "first" and at == 0)
                packed.append(self._encode_raw(segment.text, self._chunks, prepends=prepends))
        return b"".join(packed)

    def _encode_raw(self, text: str, chunks: WordCache, *, prepends: bool) -> bytes:
        """A text by its chunks. Each is encoded with a space before it: so the first must
        have one, or get one."""
        parts = split_at_white_space(text) if prepends or text[:1] == " " else None
        if parts:
            try:
                ids = b"".join(map(chunks.__getitem__, parts))
            except NotAlone:
                pass
            else:
                return ids + self._tail if text[-1].isspace() else ids
        text = self._normalize(text)
        if prepends and text and not text.startswith((SPACE, " ")):
            text = f"{SPACE}{text}"
        return self._encode_normalized(text)

    def _encode_chunk(self, chunk: str) -> bytes:
        """What a space and `chunk` behind it become."""
        if chunk.isascii() and self._ascii_form is not None and chunk.isprintable():
            text = self._ascii_form(chunk)
        else:
            if not (chunk.isascii() or stands_alone(chunk)):
                raise NotAlone
            text = self._normalize(chunk)
            if not text or text[0] in _SPACES or text[-1] in _SPACES:
                raise NotAlone
        if self._cuts_at_spaces_only and " " not in text and SPACE not in text:
            return self._encode_word(SPACE + text)
        return self._encode_normalized(f" {text}")

    def _encode_normalized(self, text: str) -> bytes:
        if self._pre_tokenizer is None:
            return self._encode_word(text)
        # Chunks are words, nearly, and cached already.
        ids_of = self._words.__getitem__ if self._chunks is None else self._encode_word
        return b"".join(b"".join(map(ids_of, words)) for words in self._pre_tokenizer.words(text))

    def _encode_word(self, word: str) -> bytes:
        cut = self._boundaries.units
        if cut is None or len(word) > self._max_cut_len or self._find_special(word):
            return self._encode_whole(word)
        units = cut(word)
        if units[0] == word and (len(word) <= _MAX_UNIT_LEN or word[1:].isascii()):
            return self._encode_whole(word)
        try:
            return b"".join(map(self._units.__getitem__, units))
        except NotAlone:
            return self._encode_whole(word)

    def _encode_unit(self, unit: str) -> bytes:
        if len(unit) > _MAX_UNIT_LEN and not unit.isascii():
            pieces = self._boundaries.pieces(unit)
            if len(pieces) > 1:
                return b"".join(map(self._units.__getitem__, pieces))
        return self._encode_whole(unit, self._margin)


class _UnitEncoder:
    """A unit to packed ids, nothing cached."""

    def __init__(self, spec: TokenizerSpec) -> None:
        if len(spec.scores) > len(spec.tokens) or not spec.scores:
            raise StartupError(
                f"{spec.source}: {len(spec.tokens)} tokens have {len(spec.scores)} scores"
            )
        self._scores = spec.scores
        self._id_of = dict(zip(spec.tokens, range(len(spec.scores)), strict=False))
        self._id_of.pop("", None)
        self._short = _ShortTokens(self._id_of, spec.scores)
        by_len = sorted((token for token in self._id_of if len(token) > _SHORT_LEN), key=len)
        #: By what a token that is not short ends with, one character more than short:
        #: the longest. Most text ends with none, and no token need be looked for.
        endings = map(itemgetter(slice(-_SHORT_LEN - 1, None)), by_len)
        self._longest = dict(zip(endings, map(len, by_len), strict=True))
        self._unk_id = spec.unk_id
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        self._byte_ids = [self._id_of.get(name) if spec.byte_fallback else None for name in names]
        if self._unk_id is None and None in self._byte_ids:
            raise StartupError(f"{spec.source}: Unigram needs an unknown token")

    def __call__(self, unit: str, margin: float = 0.0) -> bytes:
        """Raises NotAlone if the best path is nearer than `margin` to another, if that is not 0."""
        find, end = self._id_of.get, len(unit)
        if end == 1 and (known := find(unit, _UNKNOWN)) not in (_UNKNOWN, self._unk_id):
            return pack_tokens([known])
        best, last_len = self._best(unit)
        pieces = []
        while end:
            if margin and self._is_near(unit, end, best, margin):
                raise NotAlone
            start = end - last_len[end]
            pieces.append(unit[start:end])
            end = start
        pieces.reverse()
        ids = [find(piece, _UNKNOWN) for piece in pieces]
        if _UNKNOWN in ids or self._unk_id in ids:
            ids = self._with_unknown(pieces, ids)
        return pack_tokens(ids)

    def _best(self, unit: str) -> tuple[list[float], list[int]]:
        """By the position where it ends: the best path's sum, and its last token's length.

        Of equal ones the longest token counts, which begins first.
        """
        # Each character with those before it, made without a step of Python for each.
        padded = _NOTHING * _SHORT_LEN + unit
        find, scores = self._id_of.get, self._scores
        short = [*map(add, map(add, padded[1:], padded[2:]), padded[3:])]
        best, last_len = [0.0], [0]
        one, two, three = 0.0, _NEVER, _NEVER
        for (score_1, score_2, score_3), longest in zip(
            map(self._short.__getitem__, short),
            map(self._longest.get, map(add, padded, short)),
            strict=True,
        ):
            total, token_len = three + score_3, 3
            if longest is not None:
                end = len(best)
                for start in range(end - _SHORT_LEN - 1, max(end - longest, 0) - 1, -1):
                    found = find(unit[start:end])
                    if found is not None and (other := best[start] + scores[found]) >= total:
                        total, token_len = other, end - start
            if (other := two + score_2) > total:
                total, token_len = other, 2
            if (other := one + score_1) > total:
                total, token_len = other, 1
            best.append(total)
            last_len.append(token_len)
            one, two, three = total, one, two
        return best, last_len

    def _is_near(self, unit: str, end: int, best: list[float], margin: float) -> bool:
        """Whether two paths to `end` are nearer to each other than `margin`."""
        longest = self._longest.get(unit[max(end - _SHORT_LEN - 1, 0) : end], _SHORT_LEN)
        unknown = self._short.unknown_score
        near = 0
        for start in range(max(end - longest, 0), end):
            found = self._id_of.get(unit[start:end])
            if found is not None or start == end - 1:
                score = unknown if found is None else self._scores[found]
                near += best[start] + score >= best[end] - margin
        return near > 1

    def _with_unknown(self, pieces: list[str], ids: list[int]) -> list[int]:
        """The ids of a path where unknown characters in a row become one."""
        fused: list[int] = []
        unknown = ""
        for piece, token_id in zip(pieces, ids, strict=True):
            if token_id in (_UNKNOWN, self._unk_id):
                unknown += piece
                continue
            if unknown:
                fused += self._unknown(unknown)
                unknown = ""
            fused.append(token_id)
        return fused + self._unknown(unknown) if unknown else fused

    def _unknown(self, piece: str) -> list[int]:
        token_id = self._id_of.get(piece)
        if token_id is not None:
            return [token_id]
        of_bytes = [at for byte in piece.encode() if (at := self._byte_ids[byte]) is not None]
        if len(of_bytes) == len(piece.encode()):
            return of_bytes
        assert self._unk_id is not None
        return [self._unk_id]


class _ShortTokens(dict[str, tuple[float, float, float]]):
    """By the last _SHORT_LEN characters: the scores of the tokens of one, two and three
    that they end with. Bounded, and filled by what is asked for: most repeats soon."""

    def __init__(self, id_of: dict[str, int], scores: Sequence[float]) -> None:
        super().__init__()
        self._id_of, self._scores = id_of, [*scores, _NEVER]
        self.unknown_score = min(scores) - _UNKNOWN_PENALTY

    def __missing__(self, text: str) -> tuple[float, float, float]:
        find, scores = self._id_of.get, self._scores
        one = find(text[2:])
        found = (
            self.unknown_score if one is None else scores[one],
            scores[find(text[1:], -1)],
            scores[find(text, -1)],
        )
        if len(self) >= _MAX_SHORT:
            self.clear()
        self[text] = found
        return found
