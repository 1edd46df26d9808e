"""How token ids become text: the same for the service's decode and the gateway's table.

    shown tokens -> bytes of each -> concatenation -> UTF-8

Which bytes a token stands for is decided once per vocabulary, by family, in one of
the constructors below; then no family is known any more. What a token's bytes are
never depends on its neighbours, but for the first token that shows anything: so
text can be made token by token (see services/gateway/detokenizer.py).

Texts are those of Hugging Face's `tokenizers`, with these differences:

- Byte fallback: each byte that is part of no whole character becomes one U+FFFD, as
  in the `sentencepiece` library. `tokenizers` makes that of all bytes of a run if one
  is wrong, so that none can be shown before the run is over.
- A byte-level vocabulary's added token is its content. `tokenizers` takes content
  that is spelled with GPT-2's letters only ("õ") for the bytes of these letters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace.utf8 import REPLACE_EACH_BYTE

if TYPE_CHECKING:
    from services.tokenizer.backends.base import TokenizerSpec


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """One vocabulary's texts. See DetokenizerTable in tokenizer.proto for the fields' meaning."""

    #: By id.
    pieces: Sequence[bytes]
    special_ids: frozenset[int]
    #: Each byte that is part of no whole character becomes one U+FFFD; else an invalid
    #: sequence becomes what Python's "replace" makes of it.
    replaces_each_byte: bool = False
    strips_first_space: bool = False
    #: Pieces that differ when nothing is shown before them.
    first: Mapping[int, bytes] = field(default_factory=dict)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of `ids`, as a text of its own. Ids beyond the vocabulary show nothing."""
        if skip_special and not self.special_ids.isdisjoint(ids):
            ids = [i for i in ids if i not in self.special_ids]
        size = len(self.pieces)
        if ids and max(ids) >= size:
            ids = [i for i in ids if i < size]
        pieces = [*map(self.pieces.__getitem__, ids)]
        if self.first or self.strips_first_space:
            at = next((at for at, piece in enumerate(pieces) if piece), None)
            if at is not None:
                pieces[at] = self._first_piece(ids[at])
        errors = REPLACE_EACH_BYTE if self.replaces_each_byte else "replace"
        return b"".join(pieces).decode("utf-8", errors)

    def _first_piece(self, token_id: int) -> bytes:
        piece = self.first.get(token_id, self.pieces[token_id])
        return piece.removeprefix(b" ") if self.strips_first_space else piece


def byte_level_texts(spec: TokenizerSpec) -> TokenTexts:
    """A token's letters are bytes, in GPT-2's alphabet; an added token is its content."""
    pieces = [bytes_of(token) for token in spec.tokens]
    for token in spec.added:
        pieces[token.token_id] = token.content.encode()
    return TokenTexts(pieces, _special_ids(spec), strips_first_space=spec.strips_first_space)


def sentencepiece_texts(spec: TokenizerSpec) -> TokenTexts:
    """U+2581 is a space, in added tokens too, and with byte fallback <0x0A> a byte."""
    pieces = [token.replace(SPACE, " ").encode() for token in spec.tokens]
    if spec.byte_fallback:
        for at, token in enumerate(spec.tokens):
            if len(token) == _BYTE_TOKEN_LEN and (found := _is_byte_token(token)):
                pieces[at] = bytes([int(found[1], 16)])
    return TokenTexts(
        pieces,
        _special_ids(spec),
        replaces_each_byte=spec.byte_fallback,
        strips_first_space=spec.strips_first_space,
    )


def wordpiece_texts(spec: TokenizerSpec) -> TokenTexts:
    """A word begins with a space unless it is the first; what continues one has none."""
    pieces, first = [], {}
    for at, token in enumerate(spec.tokens):
        piece, alone = b"", b""
        if token:
            inside = token.startswith(spec.continuing_prefix)
            text = token.removeprefix(spec.continuing_prefix) if inside else f" {token}"
            piece = _cleaned(text, spec).encode()
            alone = _cleaned(token, spec).encode()
        pieces.append(piece)
        if alone != piece:
            first[at] = alone
    return TokenTexts(pieces, _special_ids(spec), first=first)


#: What SentencePiece writes for a space.
SPACE = "\u2581"

_BYTE_TOKEN_LEN = len("<0x0A>")
_is_byte_token = re.compile("<0x([0-9A-Fa-f]{2})>").fullmatch

# In this order: huggingface/tokenizers, decoders/wordpiece.rs, `cleanup`.
_CLEANUPS = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def bytes_of(token: str) -> bytes:
    """What a byte-level token stands for. One with a letter that stands for no byte
    stands for itself."""
    try:
        return token.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def _cleaned(text: str, spec: TokenizerSpec) -> str:
    if spec.cleans_up:
        for dirty, clean in _CLEANUPS:
            text = text.replace(dirty, clean)
    return text


def _special_ids(spec: TokenizerSpec) -> frozenset[int]:
    return frozenset(token.token_id for token in spec.added if token.is_special)


def _byte_chars() -> list[str]:
    """The character that stands for each byte in a vocabulary, by byte.

    GPT-2's table (openai/gpt-2, src/encoder.py, bytes_to_unicode): printable Latin-1
    stands for itself, the rest for U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


#: GPT-2's alphabet: the letter of each byte.
BYTE_CHARS = _byte_chars()
#: Back to Latin-1, where what stands for no byte becomes a letter outside of it.
_TO_LATIN_1 = {at: 0xFFFF for at in range(256) if chr(at) not in BYTE_CHARS} | {
    ord(char): byte for byte, char in enumerate(BYTE_CHARS)
}
