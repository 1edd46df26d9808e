"""Read a GGUF file: metadata, tensor table, raw tensor bytes. Memory-mapped.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2, 3,
little-endian). The `gguf` library reads the same header in 4.5 s for SmolLM2's
49,152-token vocabulary, which every process of a mesh would wait for; this takes
less than a tenth of one. Dequantizing is left to that library.

It knows the container, not what models are in it.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from headrace.errors import StartupError

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

#: ggml type number -> (name, elements of a block, bytes of a block).
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
}  # fmt: skip

_MAX_COUNT = 1 << 24
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. `shape` is in numpy's order (outermost first)."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    length: int

    @property
    def type_name(self) -> str:
        """ggml's name of the type."""
        return TENSOR_TYPES[self.type_id][0]


class GgufFile:
    """One open GGUF file. Raises StartupError, naming file and fault, for a bad one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise StartupError(f"can't read model file {path}: {error}") from error
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorEntry] = {}
        #: For each metadata key, where its raw value lies.
        self.extents: dict[str, tuple[int, int]] = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            self._fail(f"the header is cut off or corrupted at byte {self._at} ({error})")

    def raw(self, name: str) -> memoryview:
        """A tensor's bytes as stored. Valid while this object lives."""
        entry = self.tensors[name]
        return memoryview(self._map)[entry.offset : entry.offset + entry.length]

    def forget(self, name: str) -> None:
        """Let the system drop a tensor's pages; they are read again when looked at."""
        entry = self.tensors[name]
        # Pages are shared with neighbours at both ends: those stay.
        start = -(-entry.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (entry.offset + entry.length) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def raw_value(self, key: str) -> bytes:
        """A metadata value's bytes as stored."""
        start, end = self.extents[key]
        return self._map[start:end]

    def _read_header(self) -> None:
        if self._map[:4] != _MAGIC:
            self._fail("it does not begin with 'GGUF'")
        self._at = 4
        version, num_tensors, num_keys = self._unpack("<IQQ")
        if version not in (2, 3):
            self._fail(f"version {version} is not supported (2 and 3 are)")
        if max(num_tensors, num_keys) > _MAX_COUNT:
            self._fail("the header's counts are absurd: it is corrupted")
        for _ in range(num_keys):
            key = self._string()
            (kind,) = self._unpack("<I")
            start = self._at
            self.metadata[key] = self._value(kind)
            self.extents[key] = (start, self._at)
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            self._fail(f"general.alignment is {alignment!r}")
        base = -(-self._at // alignment) * alignment
        for entry in entries:
            offset = base + entry.offset
            if offset + entry.length > len(self._map):
                self._fail(
                    f"tensor {entry.name} ends at byte {offset + entry.length}, "
                    f"the file at {len(self._map)}: it is truncated; fetch it again"
                )
            self.tensors[entry.name] = TensorEntry(
                entry.name, entry.shape, entry.type_id, offset, entry.length
            )

    def _tensor_entry(self) -> TensorEntry:
        name = self._string()
        (num_dims,) = self._unpack("<I")
        if num_dims > 8:
            self._fail(f"tensor {name} has {num_dims} dimensions")
        dims = self._unpack(f"<{num_dims}Q")
        type_id, offset = self._unpack("<IQ")
        if type_id not in TENSOR_TYPES:
            self._fail(f"tensor {name} has type {type_id}, which is not supported")
        _, per_block, block_len = TENSOR_TYPES[type_id]
        count = math.prod(dims)
        if count % per_block:
            self._fail(f"tensor {name} has {count} elements, not a multiple of {per_block}")
        return TensorEntry(name, dims[::-1], type_id, offset, count // per_block * block_len)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, count = self._unpack("<IQ")
            if count > _MAX_COUNT:
                self._fail(f"an array of {count} items: the header is corrupted")
            if item_kind in _SCALARS:
                return list(self._unpack(f"<{count}{_SCALARS[item_kind]}"))
            if item_kind == _STRING:
                return self._strings(count)
            return [self._value(item_kind) for _ in range(count)]
        if kind not in _SCALARS:
            self._fail(f"a metadata value has the unknown type {kind}")
        return self._unpack(f"<{_SCALARS[kind]}")[0]

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        data, at, end = self._map, self._at, len(self._map)
        length_of = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            (length,) = length_of(data, at)
            at += 8 + length
            if at > end:
                raise struct.error("a string passes the file's end")
            found.append(data[at - length : at].decode())
        self._at = at
        return found

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._map, self._at)
        self._at += struct.calcsize(form)
        return values

    def _fail(self, reason: str) -> NoReturn:
        raise StartupError(f"model file {self.path}: {reason}")
