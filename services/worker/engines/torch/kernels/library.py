"""The kernels as functions of torch tensors.

CPU tensors, float32 unless said otherwise, whose last dimension is contiguous.
Shapes are checked by the callers' own constructors: a call costs 2 µs, and
checking would double it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Literal, NamedTuple

import torch

from services.worker.engines.torch.kernels.compiler import library

_log = logging.getLogger(__name__)
_P, _N, _F = c_void_p, c_int64, c_float
#: What `kernels.c` declares.
_SIGNATURES = {
    "linear": (_P, _N, _P, c_int, _N, _N, _N, _P, _N),
    "pack": (_P, _P, c_int, _N, _N),
    "attend": (_P, _N, _P, _P, c_int, _N, _N, _N, _N, _N, _P, _N, _P, _N, _F, _F),
    "store": (_P, _N, _P, c_int, _N, _N, _N, _N, _P),
    "rms_norm": (_P, _N, _P, _P, _N, _N, _F),
    "gate": (_P, _P, _N, _N, c_int),
    "angles": (_P, _P, _N, _N, _F, _P, _P),
    "rotate": (_P, _N, _N, _N, _N, _N, _P, _P),
}
#: kernels.c's ROWS, MAX_D and MAX_GROUP.
ROWS_PER_TILE, MAX_HEAD_DIM, MAX_GROUP = 32, 512, 64
_PANEL = 16

Activation = Literal["silu", "gelu_tanh"]


class Packed(NamedTuple):
    """A weight, [columns, K], in the kernels' order."""

    data: torch.Tensor
    columns: int
    k: int
    is_bf16: bool


class Tiles(NamedTuple):
    """A step's queries in tiles, [num_tiles, 4] int64, and its block tables, int32."""

    tiles: torch.Tensor
    blocks: torch.Tensor


class Kernels:
    """The functions of one compiled library."""

    def __init__(self, path: str) -> None:
        found = ctypes.CDLL(path)
        for name, types in _SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes, function.restype = types, None
        self._linear = found.linear
        self._pack = found.pack
        self._attend = found.attend
        self._store = found.store
        self._rms_norm = found.rms_norm
        self._gate = found.gate
        self._angles = found.angles
        self._rotate = found.rotate

    def pack(self, weight: torch.Tensor) -> Packed:
        """A float32 or bfloat16 weight, [columns, K], for `linear`."""
        weight = weight.contiguous()
        columns, k = weight.shape
        data = torch.empty(-(-columns // _PANEL) * _PANEL * k, dtype=weight.dtype)
        is_bf16 = weight.dtype == torch.bfloat16
        self._pack(weight.data_ptr(), data.data_ptr(), is_bf16, columns, k)
        return Packed(data, columns, k, is_bf16)

    def linear(self, x: torch.Tensor, weight: Packed) -> torch.Tensor:
        """x Wᵀ. Shapes: [rows, K] -> [rows, columns]."""
        data, columns, k, is_bf16 = weight
        rows = x.shape[0]
        y = torch.empty(rows, columns)
        self._linear(
            x.data_ptr(), x.stride(0), data.data_ptr(), is_bf16, rows, k, columns, y.data_ptr(),
            columns,
        )  # fmt: skip
        return y

    def store(self, rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Write [tokens, 2 · kv_heads, D] at `slots` of a [2 · kv_heads, num_slots, D] cache."""
        tokens, heads, head_dim = rows.shape
        self._store(
            rows.data_ptr(), rows.stride(0), cache.data_ptr(), cache.dtype == torch.bfloat16,
            tokens, heads, head_dim, cache.shape[1], slots.data_ptr(),
        )  # fmt: skip

    def attend(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        queries: Tiles,
        *,
        block_size: int,
        window: int | None,
        scale: float,
        soft_cap: float | None,
    ) -> torch.Tensor:
        """Causal attention of [tokens, heads, D] over a [2 · kv_heads, num_slots, D] cache."""
        tokens, heads, head_dim = query.shape
        out = torch.empty(tokens, heads, head_dim)
        self._attend(
            query.data_ptr(), query.stride(0), out.data_ptr(), cache.data_ptr(),
            cache.dtype == torch.bfloat16, heads, cache.shape[0] // 2, head_dim, cache.shape[1],
            block_size, queries.tiles.data_ptr(), queries.tiles.shape[0],
            queries.blocks.data_ptr(), window or 0, scale, soft_cap or 0.0,
        )  # fmt: skip
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Shapes: [rows, E] and [E], E a multiple of 8."""
        y = torch.empty(x.shape)
        rows, size = x.shape
        self._rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), y.data_ptr(), rows, size, eps)
        return y

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """The activated first half of each row, times the second: [rows, 2F] -> [rows, F].

        x is contiguous, F a multiple of 8.
        """
        rows, both = x.shape
        y = torch.empty(rows, both // 2)
        self._gate(x.data_ptr(), y.data_ptr(), rows, both // 2, activation == "gelu_tanh")
        return y

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines for `rotate`: [tokens] int64, [R / 2] -> twice [tokens, R]."""
        tokens, half = len(positions), frequencies.numel()
        cosines, sines = torch.empty(2, tokens, 2 * half)
        self._angles(
            positions.data_ptr(), frequencies.data_ptr(), tokens, half, factor,
            cosines.data_ptr(), sines.data_ptr(),
        )  # fmt: skip
        return cosines, sines

    def rotate(self, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
        """Rotate [tokens, heads, D] in place by [tokens, R], R a multiple of 16."""
        tokens, count, head_dim = heads.shape
        self._rotate(
            heads.data_ptr(), heads.stride(0), tokens, count, head_dim, cosines.shape[-1],
            cosines.data_ptr(), sines.data_ptr(),
        )  # fmt: skip


def takes_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether `attend` and `store` take heads of this shape."""
    return head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM and num_heads // num_kv_heads <= MAX_GROUP


@functools.cache
def kernels() -> Kernels | None:
    """The kernels of this machine, compiled if they were not yet; None if they can't be."""
    path = library()
    try:
        return Kernels(str(path)) if path else None
    except OSError as error:
        _log.warning("can't load the CPU kernels, the engine is slower: %s", error)
        return None
