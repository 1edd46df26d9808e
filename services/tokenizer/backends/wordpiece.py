"""WordPiece, as BERT has it.

    text -> segments -> chunks between white space -> normalizer -> words -> longest
    tokens first, from the left -> ids

A word that has no such decomposition, or is too long, is the unknown token as a
whole (huggingface/tokenizers, models/wordpiece). Where the normalizer allows it,
chunks are cut before it and cached with their ids: see raw_chunks.py. Else the
normalized text's words are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.blocks import pack_tokens
from headrace.errors import StartupError
from services.tokenizer.backends.raw_chunks import ascii_form, split_at_white_space
from services.tokenizer.backends.segments import Segmenter
from services.tokenizer.backends.token_texts import wordpiece_texts
from services.tokenizer.backends.word_cache import WordCache

if TYPE_CHECKING:
    from services.tokenizer.backends.base import TokenizerSpec

#: Bytes of a half of the cache of words, which only helps that of chunks.
_WORDS_HALF_LEN = 4 << 20


class WordPiece:
    """One vocabulary. Implements Backend."""

    def __init__(self, spec: TokenizerSpec) -> None:
        if spec.unk_id is None:
            raise StartupError(f"{spec.source}: WordPiece needs an unknown token")
        self.vocab_size = len(spec.tokens)
        self.texts = wordpiece_texts(spec)
        self._added = {token.token_id: pack_tokens([token.token_id]) for token in spec.added}
        self._normalize = spec.normalizer
        self._pre_tokenizer = spec.pre_tokenizer
        self._words = WordCache(_WordEncoder(spec), _WORDS_HALF_LEN)
        self._chunks: WordCache | None = None
        self._ascii_form = ascii_form(spec.normalizer)
        if spec.has_local_chunks and not any(t.normalized for t in spec.added):
            self._chunks = WordCache(self._encode_chunk)
            spec = replace(spec, normalizer=None)
        self._segments = Segmenter(spec).segments

    def encode(self, text: str, *, parse_added: bool = True) -> bytes:
        """See Backend."""
        return b"".join(
            self._added[segment.token_id]
            if segment.token_id >= 0
            else self._encode_segment(segment.text)
            for segment in self._segments(text, parse_added=parse_added)
        )

    def _encode_segment(self, text: str) -> bytes:
        if self._chunks is None:
            return self._encode_normalized(text)
        chunks = split_at_white_space(text)
        if chunks is None:
            return self._encode_raw(text)
        return b"".join(map(self._chunks.__getitem__, chunks))

    def _encode_chunk(self, chunk: str) -> bytes:
        if chunk.isascii() and self._ascii_form is not None and chunk.isprintable():
            chunk = self._ascii_form(chunk)
            return self._words[chunk] if chunk.isalpha() else self._encode_normalized(chunk)
        return self._encode_raw(chunk)

    def _encode_raw(self, text: str) -> bytes:
        return self._encode_normalized(self._normalize(text) if self._normalize else text)

    def _encode_normalized(self, text: str) -> bytes:
        ids_of = self._words.__getitem__
        if self._pre_tokenizer is None:
            return ids_of(text) if text else b""
        return b"".join(b"".join(map(ids_of, words)) for words in self._pre_tokenizer.words(text))


class _WordEncoder:
    """A word to packed ids, nothing cached."""

    def __init__(self, spec: TokenizerSpec) -> None:
        prefix = spec.continuing_prefix
        #: By text, at a word's start and behind it.
        self._start = {token: at for at, token in enumerate(spec.tokens) if token}
        self._inside = {
            token.removeprefix(prefix): at
            for token, at in self._start.items()
            if token.startswith(prefix) and len(token) > len(prefix)
        }
        self._longest = max(map(len, self._start), default=0)
        self._max_word_len = spec.max_word_len
        assert spec.unk_id is not None
        self._unknown = pack_tokens([spec.unk_id])

    def __call__(self, word: str) -> bytes:
        length = len(word)
        if length > self._max_word_len:
            return self._unknown
        ids: list[int] = []
        tokens, start = self._start, 0
        while start < length:
            for end in range(min(length, start + self._longest), start, -1):
                token_id = tokens.get(word[start:end])
                if token_id is not None:
                    break
            else:
                return self._unknown
            ids.append(token_id)
            tokens, start = self._inside, end
        return pack_tokens(ids)
