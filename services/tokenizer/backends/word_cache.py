"""Words repeat: a bounded cache of word -> packed ids.

It is a dict that computes what it lacks, so that a word which is in it costs no
Python at all: `b"".join(map(cache.__getitem__, words))`. It knows no vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Words of more characters than this are not kept.
MAX_WORD_LEN = 128
#: Bytes that each of the cache's two halves may hold, counted with what they cost.
HALF_LEN = 6 << 20
#: What an entry costs beside its word and ids: its share of the dict's table.
_ENTRY_LEN = 100


class WordCache(dict[str, bytes]):
    """Word -> packed ids, by `encode` where it is not known. Bounded in bytes.

    Two halves: when the young one is full it becomes the old one, and the old one
    is forgotten; what is used again moves back. So what lives is what was used
    since two fillings, and a hit costs no bookkeeping.
    """

    def __init__(self, encode: Callable[[str], bytes], half_len: int = HALF_LEN) -> None:
        super().__init__()
        self._encode = encode
        self._half_len = half_len
        self._len = 0
        self._old: dict[str, bytes] = {}

    def __missing__(self, word: str) -> bytes:
        ids = self._old.get(word)
        if ids is None:
            ids = self._encode(word)
            if len(word) > MAX_WORD_LEN:
                return ids
        self._len += word.__sizeof__() + ids.__sizeof__() + _ENTRY_LEN
        if self._len > self._half_len:
            # The same object goes on as the young half: callers hold its methods.
            self._old = self.copy()
            self.clear()
            self._len = 0
        self[word] = ids
        return ids
