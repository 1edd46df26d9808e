"""GGUF tensors, dequantized. The container is read by `headrace.models.gguf_file`.

Block formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
Types that dominate real files are unpacked here with torch, in pieces that stay
in the cache; SmolLM2 (Q4_1, Q8_0) loads in 0.5 s on 2 threads that way, and in
1.6 s by the `gguf` library, which does all other types. A test holds both equal.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from headrace.errors import StartupError
from headrace.models.gguf_file import TENSOR_TYPES, GgufFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: Blocks of 32 elements unpacked at a time: 1 MiB of float32.
_PIECE = 8192
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufCheckpoint:
    """The tensors of one GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self.shapes = {name: entry.shape for name, entry in self._file.tensors.items()}
        for name, entry in self._file.tensors.items():
            if entry.type_name.startswith("I") or entry.type_name == "F64":
                raise StartupError(
                    f"weights {path}: tensor {name} is {entry.type_name}, which no weight is"
                )

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """See Checkpoint.read_into. `out` is contiguous."""
        entry = self._file.tensors[name]
        raw = np.frombuffer(self._file.raw(name), dtype=np.uint8)
        if entry.type_name in _PLAIN:
            values = torch.from_numpy(raw.copy()).view(_PLAIN[entry.type_name])
            out.copy_(values.view(entry.shape))
            return
        _, block_elements, block_len = TENSOR_TYPES[entry.type_id]
        if math.prod(entry.shape[-1:]) % block_elements:
            raise StartupError(
                f"weights {self.path}: tensor {name} of shape {list(entry.shape)} does not "
                f"divide into {entry.type_name} blocks of {block_elements}"
            )
        unpack = _UNPACK.get(entry.type_name)
        blocks = raw.reshape(-1, block_len)
        target = out.view(-1, block_elements)
        for start in range(0, len(blocks), _PIECE):
            piece = blocks[start : start + _PIECE]
            values = (
                unpack(torch.from_numpy(piece.copy()))
                if unpack
                else _by_library(piece, entry.type_id)
            )
            target[start : start + len(piece)] = values


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """Scale and minimum as f16, then 16 bytes: element i in the low, i + 16 in the high half.

    Shapes: [n, 20] uint8 -> [n, 32] float32.
    """
    scales = blocks[:, :4].contiguous().view(torch.float16).float()  # [n, 2]
    packed = blocks[:, 4:]
    values = torch.empty(len(blocks), 32)
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4
    return values.mul_(scales[:, :1]).add_(scales[:, 1:])


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """Scale as f16, then as Q4_1, centred on 8. Shapes: [n, 18] uint8 -> [n, 32] float32."""
    scales = blocks[:, :2].contiguous().view(torch.float16).float()  # [n, 1]
    packed = blocks[:, 2:]
    values = torch.empty(len(blocks), 32)
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4
    return values.sub_(8).mul_(scales)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """Scale as f16, then 32 signed bytes. Shapes: [n, 34] uint8 -> [n, 32] float32."""
    scales = blocks[:, :2].contiguous().view(torch.float16).float()  # [n, 1]
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(scales)


def _by_library(blocks: np.ndarray, type_id: int) -> torch.Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType(type_id)))


_UNPACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
