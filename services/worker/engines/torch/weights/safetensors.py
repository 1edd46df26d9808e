"""Safetensors files, read without the library (which is built with Rust).

Format: https://huggingface.co/docs/safetensors. 8 bytes of header length
(little-endian), a JSON object name -> {dtype, shape, data_offsets}, raw data.
Everything is checked before a byte of data is looked at: a header can't make the
reader pass the file's end, read a byte twice or allocate more than the file holds.
"""

from __future__ import annotations

import json
import math
import mmap
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch

from headrace.errors import StartupError

if TYPE_CHECKING:
    from pathlib import Path

#: The library's own limit.
_MAX_HEADER_LEN = 100_000_000
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_INDEX = "model.safetensors.index.json"


class Entry(NamedTuple):
    """Where a tensor lies: bytes `start` to `end` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One open file. Raises StartupError, naming file, tensor and fault, for a bad one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Private, so that torch may see it as writable; nothing writes.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise StartupError(f"can't read model file {path}: {error}") from error
        self.entries: dict[str, Entry] = {}
        self._read_header()

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored, on the file's memory. Valid while this object lives."""
        entry = self.entries[name]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        count = math.prod(entry.shape)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.end - entry.start,
                               offset=entry.start)  # fmt: skip
        if entry.start % entry.dtype.itemsize:
            raw = raw.clone()
        return raw.view(entry.dtype)[:count].view(entry.shape)

    def forget(self, name: str) -> None:
        """Let the system drop a tensor's pages; they are read again when looked at."""
        entry = self.entries[name]
        # Pages are shared with neighbours at both ends: those stay.
        start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = entry.end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def _read_header(self) -> None:
        size = len(self._map)
        length = int.from_bytes(self._map[:8], "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_LEN):
            self._fail(f"the header's length is {length} bytes, the file's {size}")
        base = 8 + length
        try:
            header = json.loads(self._map[8:base])
        except (ValueError, RecursionError) as error:
            self._fail(f"the header is not JSON ({error})")
        if not isinstance(header, dict):
            self._fail("the header is not a JSON object")
        header.pop("__metadata__", None)
        for name, value in header.items():
            self.entries[name] = self._entry(name, value, base)
        at = base
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1][2:]):
            if entry.start != at:
                fault = "overlaps the one before" if entry.start < at else "leaves a gap before it"
                self._fail(f"tensor {name} at byte {entry.start} {fault}")
            at = entry.end
        if at != size:
            self._fail(f"the tensors end at byte {at}, the file at {size}")

    def _entry(self, name: str, value: Any, base: int) -> Entry:
        try:
            dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
            start, end = offsets
        except (TypeError, KeyError, ValueError):
            self._fail(f"tensor {name} lacks dtype, shape or data_offsets")
        if not isinstance(shape, list) or not all(_is_count(number) for number in shape):
            self._fail(f"tensor {name} has the shape {shape!r}")
        if not _is_count(start) or not _is_count(end) or start > end:
            self._fail(f"tensor {name} has the data_offsets {offsets!r}")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            self._fail(f"tensor {name} has the dtype {dtype!r}, which is not supported")
        if base + end > len(self._map):
            self._fail(
                f"tensor {name} ends at byte {base + end}, the file at {len(self._map)}: "
                "it is truncated"
            )
        needed = math.prod(shape) * _DTYPES[dtype].itemsize
        if needed != end - start:
            self._fail(
                f"tensor {name}, {dtype} of shape {shape}, needs {needed} bytes, "
                f"but has {end - start}"
            )
        return Entry(_DTYPES[dtype], tuple(shape), base + start, base + end)

    def _fail(self, reason: str) -> NoReturn:
        raise StartupError(f"model file {self.path}: {reason}; fetch it again")


class SafetensorsCheckpoint:
    """The tensors of a directory: those that its index names, or all *.safetensors."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._file_of: dict[str, SafetensorsFile] = {}
        listed = self._listed()
        names = (
            set(listed.values()) if listed else {p.name for p in directory.glob("*.safetensors")}
        )
        if not names:
            raise StartupError(f"{directory} holds no *.safetensors")
        for file_name in sorted(names):
            file = SafetensorsFile(directory / file_name)
            for tensor in file.entries:
                if tensor in self._file_of:
                    raise StartupError(
                        f"model file {file.path}: tensor {tensor} is also in "
                        f"{self._file_of[tensor].path.name}"
                    )
                self._file_of[tensor] = file
        for tensor, file_name in listed.items():
            if tensor not in self._file_of or self._file_of[tensor].path.name != file_name:
                raise StartupError(
                    f"model file {directory / file_name}: tensor {tensor} is missing, which "
                    f"{_INDEX} places there; fetch it again"
                )
        self.shapes = {name: file.entries[name].shape for name, file in self._file_of.items()}

    def read_into(self, name: str, out: torch.Tensor, index: int | None = None) -> None:
        """See Checkpoint.read_into. Raises StartupError for a type that is no weight's."""
        tensor = self._file_of[name].tensor(name)
        if not tensor.is_floating_point():
            raise StartupError(
                f"model file {self._file_of[name].path}: tensor {name} is {tensor.dtype}, "
                "and not a floating-point weight"
            )
        out.copy_(tensor if index is None else tensor[index])
        self._file_of[name].forget(name)

    def _listed(self) -> dict[str, str]:
        """The index's map from tensor to file name, if there is an index."""
        path = self.path / _INDEX
        if not path.exists():
            return {}
        try:
            listed = json.loads(path.read_text())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StartupError(
                f"model file {path}: it has no weight_map; fetch it again"
            ) from error
        if not isinstance(listed, dict) or not all(_is_file_name(v) for v in listed.values()):
            raise StartupError(f"model file {path}: weight_map must map names to file names")
        return listed


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_file_name(value: Any) -> bool:
    # A path would reach outside the model's directory.
    return isinstance(value, str) and "/" not in value and value.endswith(".safetensors")
