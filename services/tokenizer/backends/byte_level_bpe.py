"""Byte-level byte-pair encoding, as GPT-2 has it: the family of most open models.

    text -> added tokens | words (pre-tokenizer) -> bytes -> merges by rank -> ids

Words repeat, so a bounded cache of word -> packed ids does most of the work: text
whose words are in it costs no Python per word. `_merge_short` and `_merge_long`
are the same algorithm, quadratic in C and n log n in Python; a test holds that
they agree.

Bytes that the vocabulary has no token for vanish, as in Hugging Face's
`tokenizers` (SmolLM2's lacks six control characters and the lead bytes of planes
that Unicode has not assigned): exactness goes before round trips.
"""

from __future__ import annotations

import re
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING

from headrace.blocks import pack_tokens
from headrace.errors import StartupError
from services.tokenizer.backends.pre_tokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.tokenizer.backends.base import TokenizerSpec

#: Words of more characters than this are not cached.
_MAX_CACHED_LEN = 128
#: Bytes that each of the cache's two halves may hold, counted with what they cost.
_CACHE_HALF_LEN = 16 << 20
#: What an entry costs beside its word and ids: a slot of the dict.
_ENTRY_LEN = 100
#: Longer words are merged with a heap.
_MAX_SHORT_LEN = 64


class ByteLevelBpe:
    """One vocabulary. Implements Backend."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.vocab_size = len(spec.tokens)
        self.token_bytes = [_bytes_of(token) for token in spec.tokens]
        self.special_ids = frozenset(t.token_id for t in spec.added if t.is_special)
        self._pre_tokenizer = PRE_TOKENIZERS[spec.pre_tokenizer]
        self._pre_tokenizer.compile()
        added = {token.content: pack_tokens([token.token_id]) for token in spec.added}
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        #: At each position the longest added token wins.
        self._added_pattern = (
            re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        )
        merges = _Merges(spec)
        self._words = _WordCache(merges)

    def encode(self, text: str, *, parse_added: bool = True) -> bytes:
        """See Backend. About 10 MB/s for text of known words on a 2 GHz core."""
        if not parse_added or self._added_pattern is None:
            return self._encode_plain(text)
        pieces = self._added_pattern.split(text)
        if len(pieces) == 1:
            return self._encode_plain(text)
        packed: list[bytes] = []
        for at, piece in enumerate(pieces):
            packed.append(self._added[piece] if at % 2 else self._encode_plain(piece))
        return b"".join(packed)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See Backend."""
        if skip_special and not self.special_ids.isdisjoint(ids):
            ids = [i for i in ids if i not in self.special_ids]
        return b"".join(map(self.token_bytes.__getitem__, ids)).decode("utf-8", "replace")

    def _encode_plain(self, text: str) -> bytes:
        ids_of = self._words.__getitem__
        return b"".join(b"".join(map(ids_of, words)) for words in self._pre_tokenizer.words(text))


class _WordCache(dict[str, bytes]):
    """Word -> packed ids; computes what it lacks. Bounded in bytes.

    Two halves: when the young one is full it becomes the old one, and the old one
    is forgotten; what is used again moves back. So what lives is what was used
    since two fillings, and a hit costs no bookkeeping.
    """

    def __init__(self, merges: _Merges, half_len: int = _CACHE_HALF_LEN) -> None:
        super().__init__()
        self._merges = merges
        self._half_len = half_len
        self._len = 0
        self._old: dict[str, bytes] = {}

    def __missing__(self, word: str) -> bytes:
        ids = self._old.get(word)
        if ids is None:
            ids = pack_tokens(self._merges.apply(word.encode()))
            if len(word) > _MAX_CACHED_LEN:
                return ids
        self._len += word.__sizeof__() + ids.__sizeof__() + _ENTRY_LEN
        if self._len > self._half_len:
            # The same object goes on as the young half: `encode` holds its methods.
            self._old = self.copy()
            self.clear()
            self._len = 0
        self[word] = ids
        return ids


class _Merges:
    """Which pairs of tokens become one, and in which order.

    A pair is keyed by left * vocab_size + right: an int is smaller and quicker to
    hash than a tuple.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        id_of = {token: at for at, token in enumerate(spec.tokens) if token}
        self._size = len(spec.tokens)
        #: The token of each single byte; None where the vocabulary has none.
        self._byte_ids = [id_of.get(char) for char in _BYTE_CHARS]
        self._ranks: dict[int, int] = {}
        #: By rank: what the pair becomes.
        self._merged: list[int] = []
        for rank, (left, right) in enumerate(spec.merges):
            try:
                key = id_of[left] * self._size + id_of[right]
                self._merged.append(id_of[left + right])
            except KeyError as error:
                raise StartupError(
                    f"{spec.source}: merge {rank} ({left!r}, {right!r}) names {error}, "
                    "which is no token"
                ) from error
            self._ranks[key] = rank
        self._no_rank = len(spec.merges)
        self._whole: dict[bytes, int] = {}
        if spec.ignore_merges:
            added = {token.token_id for token in spec.added}
            self._whole = {_bytes_of(t): i for t, i in id_of.items() if i not in added}

    def apply(self, word: bytes) -> list[int]:
        """The ids of a word: the pair of lowest rank merges first, leftmost if equal."""
        whole = self._whole.get(word)
        if whole is not None:
            return [whole]
        table = self._byte_ids
        ids = [at for byte in word if (at := table[byte]) is not None]
        return self._merge_short(ids) if len(ids) <= _MAX_SHORT_LEN else self._merge_long(ids)

    def _merge_short(self, ids: list[int]) -> list[int]:
        rank_of, size, none = self._ranks.get, self._size, self._no_rank
        ranks = [rank_of(left * size + right, none) for left, right in pairwise(ids)]
        while ranks:
            best = min(ranks)
            if best == none:
                break
            at = ranks.index(best)
            ids[at : at + 2] = [self._merged[best]]
            del ranks[at]
            if at < len(ranks):
                ranks[at] = rank_of(ids[at] * size + ids[at + 1], none)
            if at > 0:
                ranks[at - 1] = rank_of(ids[at - 1] * size + ids[at], none)
        return ids

    def _merge_long(self, ids: list[int]) -> list[int]:
        """Symbols are a linked list over their first positions; the heap holds
        rank * n + position, and an entry counts only while its pair has its rank."""
        rank_of, size, none, n = self._ranks.get, self._size, self._no_rank, len(ids)
        symbols = list(ids)
        following = [*range(1, n), -1]
        before = list(range(-1, n - 1))
        ranks = [rank_of(left * size + right, none) for left, right in pairwise(ids)]
        ranks.append(none)
        heap = [rank * n + at for at, rank in enumerate(ranks) if rank != none]
        heapify(heap)

        def renew(at: int) -> None:
            rank = rank_of(symbols[at] * size + symbols[following[at]], none)
            ranks[at] = rank
            if rank != none:
                heappush(heap, rank * n + at)

        while heap:
            rank, at = divmod(heappop(heap), n)
            if ranks[at] != rank:
                continue
            symbols[at] = self._merged[rank]
            gone = following[at]
            ranks[gone] = none
            following[at] = following[gone]
            if following[at] >= 0:
                before[following[at]] = at
                renew(at)
            else:
                ranks[at] = none
            if before[at] >= 0:
                renew(before[at])
        merged, at = [], 0 if symbols else -1
        while at >= 0:
            merged.append(symbols[at])
            at = following[at]
        return merged


def _byte_chars() -> list[str]:
    """The character that stands for each byte in a vocabulary, by byte.

    GPT-2's table (openai/gpt-2, src/encoder.py, bytes_to_unicode): printable Latin-1
    stands for itself, the rest for U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_CHARS = _byte_chars()
_BYTE_OF = {char: byte for byte, char in enumerate(_BYTE_CHARS)}


def _bytes_of(token: str) -> bytes:
    """What a token stands for. One with a character that stands for no byte (an
    added token, in words) stands for itself."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()
