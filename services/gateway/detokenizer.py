"""Token ids to text, one step at a time.

    text(all ids so far) == everything that `push` returned + what `flush` would

at every moment, for any split of the ids into pushes: bytes are decoded as UTF-8
with invalid sequences replaced, exactly as if all were decoded at once, and a
character that is not complete yet is held back. It knows no merges, no
vocabulary file and no wire: a table comes from the tokenizer service, once per
tokenizer digest.
"""

from __future__ import annotations

import codecs
from array import array
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterable

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class DetokenizerTable:
    """The bytes of every token of one tokenizer; special tokens show nothing.

    `data` holds all tokens' bytes one after the other, `lengths` their lengths
    (u16 little-endian), `special` one byte per token, 1 where it is not shown.
    Raises ValueError if these do not fit together.
    """

    def __init__(
        self,
        tokenizer_digest: str,
        data: bytes,
        lengths: bytes,
        special: bytes,
        eos_token_ids: Iterable[int],
    ) -> None:
        sizes = array("H", lengths)
        if _BIG_ENDIAN:
            sizes.byteswap()
        if len(sizes) != len(special) or sum(sizes) != len(data):
            raise ValueError(
                f"detokenizer table of {tokenizer_digest}: {len(sizes)} lengths that sum to "
                f"{sum(sizes)}, {len(special)} special marks and {len(data)} bytes do not fit"
            )
        self.tokenizer_digest = tokenizer_digest
        self.eos_token_ids = frozenset(eos_token_ids)
        #: A token that is whole characters is text; one that may be part of one is bytes.
        self.pieces: list[str | bytes] = []
        start = 0
        for size, hidden in zip(sizes, special, strict=True):
            self.pieces.append("" if hidden else _whole(data[start : start + size]))
            start += size

    @property
    def vocab_size(self) -> int:
        """Token ids below this have an entry."""
        return len(self.pieces)


class Detokenizer:
    """The text of one sequence, as it grows. Costs the same however long it is."""

    __slots__ = ("_decoder", "_is_inside", "_pieces")

    def __init__(self, table: DetokenizerTable) -> None:
        self._pieces = table.pieces
        self._decoder = _new_utf8_decoder(errors="replace")
        #: Whether the decoder holds the beginning of a character.
        self._is_inside = False

    def push(self, token_ids: list[int]) -> str:
        """The text that these tokens complete. Ids outside the table show nothing: a model's
        vocabulary may be padded beyond its tokenizer's."""
        pieces = self._pieces
        if len(token_ids) == 1 and not self._is_inside and token_ids[0] < len(pieces):
            piece = pieces[token_ids[0]]
            if type(piece) is str:
                return piece
        return self._decode([pieces[i] for i in token_ids if i < len(pieces)])

    def flush(self) -> str:
        """What is left at the end of the sequence: a character that never became complete."""
        self._is_inside = False
        return self._decoder.decode(b"", True)

    def _decode(self, pieces: list[str | bytes]) -> str:
        data = b"".join([p.encode() if type(p) is str else cast("bytes", p) for p in pieces])
        text = self._decoder.decode(data)
        self._is_inside = bool(self._decoder.getstate()[0])
        return text


def _whole(piece: bytes) -> str | bytes:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return piece


_BIG_ENDIAN = array("I", [1]).tobytes()[0] == 0
