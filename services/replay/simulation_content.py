"""What stands in the prompts of a trace, and the block ids that follow from it.

A trace's *piece* (the tokens behind one hash id) is that id's 64 bits over and over,
as two tokens; what is a request's own, its answer with it, is its number's. So every
token of every request is known, and block ids are those that `headrace.blocks` gives
for them, whatever the block size: router and engine agree as they do on real text.

    pieces   | h0 | h1 | h2 |  own …            | answer …
    blocks   |  0  |  1  |  2  |  3  |  4  |  5  |  6
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.blocks import TOKEN_LEN, block_ids, namespace_key, short_ids

if TYPE_CHECKING:
    from headrace.blocks import BlockId
    from services.replay.workload import TraceRequest

#: The namespace of all that is replayed.
NAMESPACE = namespace_key("replay")
#: What is a request's own has ids beyond a trace's.
_OWN, _ANSWER = 1 << 63, 3 << 62
_HASH_MASK = (1 << 62) - 1


class Content:
    """One request's tokens, prompt and answer. Ids are computed when first asked for, once."""

    __slots__ = ("_block_size", "_ids", "_number", "_piece_len", "_request")

    def __init__(self, request: TraceRequest, number: int, piece_len: int, block_size: int) -> None:
        self._request = request
        self._number = number
        self._piece_len = piece_len
        self._block_size = block_size
        self._ids: list[BlockId] = []

    def block_ids(self, count: int) -> list[BlockId]:
        """Ids of the first `count` blocks. Not to be changed."""
        known = self._ids
        if len(known) < count:
            # A prompt at once; the answer's blocks come one by one.
            whole = max(count, self._request.num_tokens // self._block_size)
            tokens = self.tokens(len(known) * self._block_size, whole * self._block_size)
            known += block_ids(tokens, self._block_size, known[-1] if known else NAMESPACE)
        return known if len(known) == count else known[:count]

    def prompt_ids(self) -> list[int]:
        """Short ids of the prompt's full blocks, as a gateway sends them to a router."""
        ids = self.block_ids(self._request.num_tokens // self._block_size)
        return short_ids(b"".join(ids))

    def tokens(self, start: int, end: int) -> bytes:
        """Tokens `start … end - 1`, packed."""
        request, size = self._request, self._piece_len
        shared = min(request.num_tokens, len(request.hash_ids) * size)
        parts = []
        at = start
        while at < end:
            if at < shared:
                first = at - at % size
                stop = min(end, first + size, shared)
                word = request.hash_ids[at // size] & _HASH_MASK
            elif at < request.num_tokens:
                first, stop, word = shared, min(end, request.num_tokens), _OWN | self._number
            else:
                first, stop, word = request.num_tokens, end, _ANSWER | self._number
            parts.append(_repeated(word, at - first, stop - first))
            at = stop
        return b"".join(parts)


class Tokens:
    """What stands for a sequence's list of tokens where only their number matters."""

    __slots__ = ("_len", "content")

    def __init__(self, content: Content, length: int) -> None:
        self.content = content
        self._len = length

    def __len__(self) -> int:
        """Tokens at first; those that come later are not counted here."""
        return self._len

    def __add__(self, other: list[int]) -> Tokens:
        return Tokens(self.content, self._len + len(other))

    def __getitem__(self, where: slice) -> range:
        """Positions, one a token."""
        return range(where.start, where.stop)


def _repeated(word: int, start: int, end: int) -> bytes:
    """Tokens `start … end - 1` of an endless row of `word`s, each of which is two tokens."""
    data = word.to_bytes(2 * TOKEN_LEN, "little") * (end // 2 + 1 - start // 2)
    skip = start % 2 * TOKEN_LEN
    return data[skip : skip + (end - start) * TOKEN_LEN]
