"""GGUF tensors, dequantized. The container is read by `headrace.models.gguf_file`.

Types that dominate real files are unpacked with torch (gguf_blocks.py), in pieces
that stay in the cache; the `gguf` library does all others. What was read is given
back to the system, so that a file is never in memory beside the weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from headrace.errors import StartupError
from headrace.models.gguf_file import TENSOR_TYPES, GgufFile
from services.worker.engines.torch.weights.gguf_blocks import UNPACK

if TYPE_CHECKING:
    from pathlib import Path

#: Elements unpacked at a time: 1 MiB of float32.
_PIECE = 1 << 18
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

    def read_into(self, name: str, out: torch.Tensor, index: int | None = None) -> None:
        """See Checkpoint.read_into. `out` is contiguous."""
        entry = self._file.tensors[name]
        raw = np.frombuffer(self._file.raw(name), dtype=np.uint8)
        if index is not None:
            raw = raw.reshape(entry.shape[0], -1)[index]
        if entry.type_name in _PLAIN:
            values = torch.from_numpy(raw.copy()).view(_PLAIN[entry.type_name])
            out.copy_(values.view(out.shape))
            self._file.forget(name)
            return
        _, block_elements, block_len = TENSOR_TYPES[entry.type_id]
        if math.prod(entry.shape[-1:]) % block_elements:
            raise StartupError(
                f"weights {self.path}: tensor {name} of shape {list(entry.shape)} does not "
                f"divide into {entry.type_name} blocks of {block_elements}"
            )
        unpack = UNPACK.get(entry.type_name)
        blocks = raw.reshape(-1, block_len)
        target = out.view(-1, block_elements)
        step = _PIECE // block_elements
        for start in range(0, len(blocks), step):
            piece = blocks[start : start + step]
            values = (
                unpack(torch.from_numpy(piece.copy()))
                if unpack
                else _by_library(piece, entry.type_id)
            )
            target[start : start + len(piece)] = values
        self._file.forget(name)


def _by_library(blocks: np.ndarray, type_id: int) -> torch.Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType(type_id)))
