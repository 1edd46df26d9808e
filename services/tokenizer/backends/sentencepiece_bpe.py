"""Byte-pair encoding as SentencePiece has it: Llama 2, Mistral, Gemma, Phi-3.

    text -> segments (spaces are U+2581) -> units -> characters -> merges -> ids

There is no pre-tokenizer: a whole segment is merged at once. But most places in a
text are such that no token reaches across, and cutting there changes nothing (see
boundaries.py). So a segment becomes units, which repeat, and a bounded cache of
unit -> ids does most of the work.

A file states merges, as a list (tokenizer.json), or scores of tokens (GGUF,
SentencePiece's own): then any two symbols merge that are a token together, the one
of highest score first, leftmost if equal (sentencepiece, src/bpe_model.cc). A
character that is no token becomes the tokens of its bytes, if they are there, or
else the unknown token.
"""

from __future__ import annotations

import re
from itertools import starmap
from operator import add
from typing import TYPE_CHECKING, Protocol

from headrace.blocks import pack_tokens
from headrace.errors import StartupError
from services.tokenizer.backends.boundaries import Boundaries
from services.tokenizer.backends.merges import Merges
from services.tokenizer.backends.score_merges import ScoreMerges
from services.tokenizer.backends.segments import Segmenter
from services.tokenizer.backends.token_texts import sentencepiece_texts
from services.tokenizer.backends.word_cache import WordCache

if TYPE_CHECKING:
    from services.tokenizer.backends.base import TokenizerSpec

#: Units of more characters are cut once more, by pairs of neighbours.
_MAX_UNIT_LEN = 16

_is_byte_token = re.compile("<0x[0-9A-Fa-f]{2}>").fullmatch


class SentencePieceBpe:
    """One vocabulary. Implements Backend."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.vocab_size = len(spec.tokens)
        self.texts = sentencepiece_texts(spec)
        self._segments = Segmenter(spec).segments
        self._pre_tokenizer = spec.pre_tokenizer
        self._added = {token.token_id: pack_tokens([token.token_id]) for token in spec.added}
        characters = _Characters(spec)
        self._encode_piece = _encoder(spec, characters)
        self._boundaries: Boundaries | None = None
        if characters.can_be_cut:
            self._boundaries = Boundaries(
                _made_by_merging(spec), unknown_fuses=spec.fuse_unk and not characters.has_bytes
            )
        self._cut = self._boundaries.units if self._boundaries else None
        self._units = WordCache(self._encode_unit)

    def encode(self, text: str, *, parse_added: bool = True) -> bytes:
        """See Backend."""
        packed = []
        for segment in self._segments(text, parse_added=parse_added):
            if segment.token_id >= 0:
                packed.append(self._added[segment.token_id])
            elif self._pre_tokenizer is None:
                packed.append(self._encode_word(segment.text))
            else:
                for words in self._pre_tokenizer.words(segment.text):
                    packed += map(self._encode_word, words)
        return b"".join(packed)

    def _encode_word(self, text: str) -> bytes:
        if self._cut is None:
            return self._units[text]
        return b"".join(map(self._units.__getitem__, self._cut(text)))

    def _encode_unit(self, unit: str) -> bytes:
        # Between two ASCII letters there is a cut so rarely that looking for it costs more.
        if self._boundaries is None or len(unit) <= _MAX_UNIT_LEN or unit[-1].isascii():
            return self._encode_piece(unit)
        pieces = self._boundaries.pieces(unit)
        if len(pieces) == 1:
            return self._encode_piece(unit)
        return b"".join(map(self._units.__getitem__, pieces))


class _Encode(Protocol):
    def __call__(self, text: str, /) -> bytes: ...


def _encoder(spec: TokenizerSpec, characters: _Characters) -> _Encode:
    """A text to packed ids, nothing cut, nothing cached."""
    if spec.token_ranks is not None:
        by_score = ScoreMerges(spec.token_ranks, _mergeable(spec))
        resolve = characters.ids_of_symbols

        def encode_by_score(text: str) -> bytes:
            return pack_tokens(resolve(by_score.apply(list(text))))

        return encode_by_score
    merges = Merges.of_pairs(spec.merges, characters.id_of, len(spec.tokens), spec.source)
    whole = characters.id_of if spec.ignore_merges else {}
    find = characters.ids_of_characters

    def encode_by_rank(text: str) -> bytes:
        if text in whole:
            return pack_tokens([whole[text]])
        return pack_tokens(merges.apply(find(text)))

    return encode_by_rank


def _mergeable(spec: TokenizerSpec) -> dict[str, int]:
    """The tokens that scores let merging make: no bytes, no added ones, not the unknown."""
    apart = {token.token_id for token in spec.added} | {spec.unk_id}
    return {
        token: at
        for at, token in enumerate(spec.tokens)
        if token and at not in apart and not (spec.byte_fallback and _is_byte_token(token))
    }


def _made_by_merging(spec: TokenizerSpec) -> list[str]:
    """All that a symbol can be."""
    if spec.token_ranks is not None:
        return list(_mergeable(spec))
    singles = [token for token in spec.tokens if len(token) == 1]
    return [*set(starmap(add, spec.merges)), *singles]


class _Characters:
    """What becomes of a character, or a symbol, that merging starts with or ends with."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.id_of = {token: at for at, token in enumerate(spec.tokens) if token}
        self._unk_id, self._fuses = spec.unk_id, spec.fuse_unk
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        self._byte_ids: list[int | None] = [
            self.id_of.get(name) if spec.byte_fallback else None for name in names
        ]
        known = sum(at is not None for at in self._byte_ids)
        #: Every character becomes something that is not the unknown token.
        self.has_bytes = known == len(names)
        #: With some bytes only, what is unknown can change places with bytes behind it.
        #: With `ignore_merges` a whole text is looked up.
        self.can_be_cut = known in (0, len(names)) and not spec.ignore_merges
        if spec.byte_fallback and not known and spec.unk_id is None:
            raise StartupError(f"{spec.source}: byte fallback without tokens for bytes")

    def ids_of_characters(self, text: str) -> list[int]:
        """The ids merging starts with (huggingface/tokenizers, models/bpe, merge_word)."""
        find = self.id_of.get
        ids = [*map(find, text)]
        if None not in ids:
            return ids  # type: ignore[return-value]  # None has just been ruled out
        return self.ids_of_symbols(text)

    def ids_of_symbols(self, symbols: list[str] | str) -> list[int]:
        """The ids of symbols in order. The unknown one is emitted when the next known
        symbol comes, as `tokenizers` does it: bytes overtake it."""
        find, ids, unknown = self.id_of.get, [], 0
        unk = [] if self._unk_id is None else [self._unk_id]
        for symbol in symbols:
            token_id = find(symbol)
            if token_id is not None:
                if unknown:
                    ids += unk * unknown
                    unknown = 0
                ids.append(token_id)
                continue
            spelled = symbol.encode()
            of_bytes = [at for byte in spelled if (at := self._byte_ids[byte]) is not None]
            if len(of_bytes) == len(spelled):
                ids += of_bytes
            elif unknown and not self._fuses:
                ids += unk
            else:
                unknown = 1
        return ids + unk * unknown
