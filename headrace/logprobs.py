"""Log probabilities, packed: what travels from the engine to the edge untouched.

For one token a record of 1 + k entries: the token itself first, then the k likeliest,
likeliest first (the token may be among them). An entry is its id, u32, and its
log probability, float32, both little-endian. A sequence's k never changes, so
records of several tokens are simply put one after the other. It knows no tensors.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_ENTRY = struct.Struct("<If")


class TokenLogprobs(NamedTuple):
    """One token's record. Entries are (token id, log probability)."""

    chosen: tuple[int, float]
    top: list[tuple[int, float]]


def record_len(count: int) -> int:
    """Bytes of a token's record with the `count` likeliest."""
    return _ENTRY.size * (1 + count)


def pack(records: Iterable[TokenLogprobs]) -> bytes:
    """Records in a row: the plain form; engines write the same bytes from arrays."""
    return b"".join(_ENTRY.pack(*entry) for chosen, top in records for entry in (chosen, *top))


def unpack(data: bytes | bytearray, count: int) -> list[TokenLogprobs]:
    """All records of `data`, each with the `count` likeliest.

    Raises struct.error if `data` is not made of whole entries.
    """
    entries = list(_ENTRY.iter_unpack(data))
    step = 1 + count
    return [
        TokenLogprobs(entries[at], entries[at + 1 : at + step])
        for at in range(0, len(entries), step)
    ]
