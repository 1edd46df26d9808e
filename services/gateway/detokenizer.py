"""Token ids to text, one step at a time.

    text(all ids so far) == everything that `push` returned + what `flush` would

at every moment, for any split of the ids into pushes: bytes are decoded as UTF-8
with what is wrong replaced, exactly as if all were decoded at once, and a
character that is not complete yet is held back. It knows no families, no merges,
no vocabulary file and no wire: a table comes from the tokenizer service, once per
tokenizer digest.

A token's text does not depend on its neighbours, with one exception: what begins
a text may read otherwise than what goes on behind something (SentencePiece's and
WordPiece's first word has no space before it). Whoever starts a `Detokenizer`
says which it is.
"""

from __future__ import annotations

import asyncio
import codecs
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from headrace.utf8 import REPLACE_EACH_BYTE

if TYPE_CHECKING:
    from collections.abc import Iterator

#: A token that is whole characters is text; one that may be part of one is bytes.
Piece = str | bytes

#: Tokens that are read at a time; takes a millisecond or two.
_SLICE_LEN = 4096


@dataclass(frozen=True, slots=True)
class TableContent:
    """What a table is made of. See DetokenizerTable in tokenizer.proto for the fields."""

    tokenizer_digest: str
    data: bytes
    lengths: bytes
    special: bytes
    eos_token_ids: Sequence[int] = ()
    replaces_each_byte: bool = False
    strips_first_space: bool = False
    first_ids: bytes = b""
    first_data: bytes = b""
    first_lengths: bytes = b""


class DetokenizerTable:
    """The text or bytes of every token of one tokenizer.

    Raises ValueError if the content's parts do not fit together.
    """

    def __init__(self, content: TableContent, pieces: list[Piece] | None = None) -> None:
        """`pieces`, if they are read already: see `load`."""
        self.tokenizer_digest = content.tokenizer_digest
        self.eos_token_ids = frozenset(content.eos_token_ids)
        if pieces is None:
            pieces = [piece for part in _read(content) for piece in part]
        #: By id; special tokens are empty.
        self.pieces = pieces
        self._special = {at: pieces[at] for at in _marked(content.special)}
        for at in self._special:
            pieces[at] = ""
        self._with_special: list[Piece] | None = None
        self._first = _read_first(content)
        self._strips = content.strips_first_space
        #: Whether what begins a text may differ.
        self.has_first = bool(self._first) or self._strips
        #: How wrong bytes are replaced: the name of a codec's error handler.
        self.errors = REPLACE_EACH_BYTE if content.replaces_each_byte else "replace"

    @classmethod
    async def load(cls, content: TableContent) -> DetokenizerTable:
        """The same in slices, between which the event loop runs."""
        pieces: list[Piece] = []
        for part in _read(content):
            pieces += part
            await asyncio.sleep(0)
        return cls(content, pieces)

    @property
    def vocab_size(self) -> int:
        """Token ids below this have an entry."""
        return len(self.pieces)

    @property
    def pieces_with_special(self) -> list[Piece]:
        """By id, special tokens as they are spelled. Made when first asked for."""
        if self._with_special is None:
            self._with_special = self.pieces.copy()
            for at, piece in self._special.items():
                self._with_special[at] = piece
        return self._with_special

    def spelled(self, token_id: int) -> bytes:
        """See generation.Vocabulary."""
        if token_id >= len(self.pieces):
            return b""
        piece = self._special.get(token_id) or self.pieces[token_id]
        return piece.encode() if isinstance(piece, str) else piece

    def first_piece(self, token_id: int, piece: Piece) -> Piece:
        """How a token that is `piece` elsewhere reads at the start of a text."""
        piece = self._first.get(token_id, piece)
        if not self._strips:
            return piece
        return piece.removeprefix(" ") if isinstance(piece, str) else piece.removeprefix(b" ")


class Detokenizer:
    """The text of one sequence, as it grows. Costs the same however long it is.

    With `goes_on` something is shown before the text: a prompt that it completes.
    Otherwise it is a text of its own, as a chat's answer is.
    """

    __slots__ = ("_at_start", "_errors", "_held", "_is_plain", "_pieces", "_table")

    def __init__(
        self, table: DetokenizerTable, *, goes_on: bool = False, skip_special: bool = True
    ) -> None:
        self._table = table
        self._pieces = table.pieces if skip_special else table.pieces_with_special
        self._errors = table.errors
        #: Whether nothing is shown before the next token, and that matters.
        self._at_start = table.has_first and not goes_on
        #: The beginning of a character.
        self._held = b""
        #: Whether a token that is text is shown as it is: neither of these two is in its way.
        self._is_plain = not self._at_start

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete. Ids outside the table show nothing: a model's
        vocabulary may be padded beyond its tokenizer's."""
        if self._is_plain and len(token_ids) == 1:
            try:
                piece = self._pieces[token_ids[0]]
            except IndexError:
                return ""
            return piece if type(piece) is str else self._decode(cast("bytes", piece))
        return self._push(token_ids)

    def flush(self) -> str:
        """What is left at the end of the sequence: a character that never became complete."""
        held, self._held = self._held, b""
        self._is_plain = not self._at_start
        return held.decode("utf-8", self._errors)

    def _push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        shown = [pieces[i] for i in token_ids if i < len(pieces)]
        if self._at_start:
            shown = self._begin(token_ids, shown)
        if not self._held:
            try:
                return "".join(cast("list[str]", shown))
            except TypeError:
                pass  # There are bytes among them.
        return self._decode(b"".join([p.encode() if isinstance(p, str) else p for p in shown]))

    def _begin(self, token_ids: Sequence[int], shown: list[Piece]) -> list[Piece]:
        ids = [i for i in token_ids if i < len(self._pieces)]
        at = next((at for at, piece in enumerate(shown) if piece), None)
        if at is None:
            return []
        self._at_start, self._is_plain = False, True
        return [self._table.first_piece(ids[at], shown[at]), *shown[at + 1 :]]

    def _decode(self, data: bytes) -> str:
        data = self._held + data
        text, used = codecs.utf_8_decode(data, self._errors)
        self._held = data[used:]
        self._is_plain = not self._held
        return text


def _read(content: TableContent) -> Iterator[list[Piece]]:
    """The pieces of all tokens, special ones too, some at a time."""
    data = content.data
    sizes = _u16(content.lengths)
    if len(sizes) != len(content.special) or sum(sizes) != len(data):
        raise ValueError(
            f"detokenizer table of {content.tokenizer_digest}: {len(sizes)} lengths that sum to "
            f"{sum(sizes)}, {len(content.special)} special marks and {len(data)} bytes do not fit"
        )
    start = 0
    for at in range(0, len(sizes), _SLICE_LEN):
        part: list[Piece] = []
        for size in sizes[at : at + _SLICE_LEN]:
            part.append(_whole(data[start : start + size]))
            start += size
        yield part


def _read_first(content: TableContent) -> dict[int, Piece]:
    ids, sizes = _little("I", content.first_ids), _u16(content.first_lengths)
    if len(sizes) != len(ids) or sum(sizes) != len(content.first_data):
        raise ValueError(
            f"detokenizer table of {content.tokenizer_digest}: {len(ids)} first ids, {len(sizes)} "
            f"lengths that sum to {sum(sizes)} and {len(content.first_data)} bytes do not fit"
        )
    first: dict[int, Piece] = {}
    start = 0
    for token_id, size in zip(ids, sizes, strict=True):
        first[token_id] = _whole(content.first_data[start : start + size])
        start += size
    return first


def _marked(special: bytes) -> Iterator[int]:
    at = special.find(1)
    while at >= 0:
        yield at
        at = special.find(1, at + 1)


def _whole(piece: bytes) -> Piece:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return piece


def _u16(packed: bytes) -> array[int]:
    return _little("H", packed)


def _little(kind: str, packed: bytes) -> array[int]:
    values = array(kind, packed)
    if _BIG_ENDIAN:
        values.byteswap()
    return values


_BIG_ENDIAN = array("I", [1]).tobytes()[0] == 0
