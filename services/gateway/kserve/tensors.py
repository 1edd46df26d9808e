"""Tensors as the Open Inference Protocol packs them, and nothing of what they mean.

Raw contents are the elements in row-major order, little-endian; each BYTES element
follows its length as uint32 (the protocol's "Tensor Contents").
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from headrace.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

Element: TypeAlias = bool | int | float | bytes

#: struct's codes by the protocol's datatypes of fixed size.
_CODES = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q",
    "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
BYTES = "BYTES"
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a request or a response: its elements in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: tuple[Element, ...]


def check_datatype(name: str, datatype: str) -> None:
    """Raises InvalidArgument for one that we can't read."""
    if datatype != BYTES and datatype not in _CODES:
        known = ", ".join((BYTES, *_CODES))
        raise InvalidArgument(
            f"input {name!r}: datatype must be one of {known}, not {datatype[:32]!r}", field=name
        )


def check_count(name: str, shape: Sequence[int], count: int) -> None:
    """Raises InvalidArgument unless `shape` has `count` elements."""
    if any(size < 0 for size in shape) or math.prod(shape) != count:
        raise InvalidArgument(
            f"input {name!r}: shape {list(shape[:8])} does not fit its {count} elements", field=name
        )


def unpack(name: str, datatype: str, raw: bytes) -> tuple[Element, ...]:
    """The elements of raw contents. Raises InvalidArgument if they are not whole."""
    check_datatype(name, datatype)
    if datatype == BYTES:
        return tuple(_unpack_bytes(name, raw))
    size = struct.calcsize(f"<{_CODES[datatype]}")
    if len(raw) % size:
        raise InvalidArgument(
            f"input {name!r}: {len(raw)} bytes are no whole number of {datatype} elements",
            field=name,
        )
    return struct.unpack(f"<{len(raw) // size}{_CODES[datatype]}", raw)


def pack(tensor: Tensor) -> bytes:
    """A tensor's raw contents."""
    if tensor.datatype != BYTES:
        code = _CODES[tensor.datatype]
        return struct.pack(f"<{len(tensor.elements)}{code}", *tensor.elements)
    packed = bytearray()
    for element in tensor.elements:
        assert isinstance(element, bytes)
        packed += _LENGTH.pack(len(element)) + element
    return bytes(packed)


def _unpack_bytes(name: str, raw: bytes) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        start = at + _LENGTH.size
        end = start + _LENGTH.unpack_from(raw, at)[0] if start <= len(raw) else start
        if end > len(raw):
            raise InvalidArgument(
                f"input {name!r}: its raw contents end inside element {len(elements)}; each BYTES "
                "element follows its length as a little-endian uint32",
                field=name,
            )
        elements.append(raw[start:end])
        at = end
    return elements
