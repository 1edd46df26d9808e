"""What a prompt shares with recent ones is not tokenized, or hashed, again.

A turn's prompt repeats the conversation so far. It is cut where an added token
begins that is found in the text as it is:

    <|im_start|>system…  |  <|im_end|>\\n<|im_start|>user…  |  <|im_end|>\\n<|im_start|>assistant\\n
    cached                  cached                             the last: encoded each time

Pieces are encoded by themselves and remembered by their text. Ids are those of
the whole, because nothing crosses such a cut: the tokens are found from left to
right, the longest at each place, before normalizer and pre-tokenizer run, which
then see what lies between two of them only; and a piece begins with its token, so
that it is no text's beginning (where some families put a space). Not cut at are
tokens that take white space to their left. Vocabularies are not cut at all if they
have tokens that look at their neighbours' characters (`single_word`), or tokens
that take the white space behind them (`rstrip`) beside some that begin with it.

Block ids are remembered by the run of tokens and the id before it. Both are exact
by construction and need no notion of a conversation: shared instructions and tools
count as well. It knows no template, process or clock.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING

from headrace.blocks import ID_LEN, TOKEN_LEN, block_ids
from services.tokenizer.backends.segments import any_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from services.tokenizer.backends.base import AddedToken

#: Characters below which a piece goes on: looking it up would cost what encoding it does.
_MIN_PIECE_LEN = 256
#: Blocks whose ids are one entry.
_RUN_BLOCKS = 64
#: What an entry costs beside its bytes: a slot of the table, two objects' heads.
_ENTRY_LEN = 250


class ByteCache:
    """The most recently used answers, bounded by their and their keys' bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, tuple[bytes, int]] = OrderedDict()

    def get(self, key: Hashable) -> bytes | None:
        """What was put under `key`, if it is still there."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: bytes, key_len: int) -> None:
        """Keep `value` under a key of `key_len` bytes, which is not there; forget the oldest."""
        length = len(value) + key_len + _ENTRY_LEN
        if length > self._max_bytes:
            return
        self._entries[key] = value, length
        self.num_bytes += length
        while self.num_bytes > self._max_bytes:
            _, (_, gone) = self._entries.popitem(last=False)
            self.num_bytes -= gone


class PieceEncoder:
    """One vocabulary's `encode`, piece by piece. `name` tells it from others in `cache`."""

    def __init__(
        self,
        name: str,
        encode: Callable[[str], bytes],
        added: Sequence[AddedToken],
        cache: ByteCache,
    ) -> None:
        self._name = name
        self._encode = encode
        self._cache = cache
        raw = [token for token in added if token.content and not token.normalized]
        self._is_cut = {token.content for token in raw if not token.lstrip}
        is_cuttable = not any(token.single_word for token in raw) and not (
            any(token.rstrip for token in raw) and any(t.content[0].isspace() for t in raw)
        )
        self._find = (
            re.compile(any_of([token.content for token in raw])).finditer
            if is_cuttable and self._is_cut
            else None
        )

    def encode(self, text: str) -> bytes:
        """The ids of `text`: those of the whole, little-endian u32."""
        packed, start = [], 0
        for end in self._cuts(text):
            piece = text[start:end]
            ids = self._cache.get((self._name, piece))
            if ids is None:
                ids = self._encode(piece)
                self._cache.put((self._name, piece), ids, piece.__sizeof__())
            packed.append(ids)
            start = end
        packed.append(self._encode(text[start:] if start else text))
        return b"".join(packed)

    def _cuts(self, text: str) -> Iterator[int]:
        """Depend on what is left of them only, so that a longer text's begin with these."""
        if self._find is None or len(text) <= _MIN_PIECE_LEN:
            return
        start = 0
        for match in self._find(text):
            at = match.start()
            if at - start >= _MIN_PIECE_LEN and match[0] in self._is_cut:
                yield at
                start = at


def packed_block_ids(tokens: bytes, block_size: int, key: bytes, cache: ByteCache) -> bytes:
    """`headrace.blocks.block_ids` of packed `tokens`, joined, through `cache`."""
    step = _RUN_BLOCKS * block_size * TOKEN_LEN
    packed = []
    for start in range(0, len(tokens) - step + 1, step):
        run = tokens[start : start + step]
        name = block_size, blake2b(run, digest_size=ID_LEN, key=key).digest()
        ids = cache.get(name)
        if ids is None:
            ids = b"".join(block_ids(run, block_size, key))
            cache.put(name, ids, ID_LEN)
        packed.append(ids)
        key = ids[-ID_LEN:]
    done = len(packed) * step
    packed += block_ids(tokens[done:], block_size, key)
    return b"".join(packed)
