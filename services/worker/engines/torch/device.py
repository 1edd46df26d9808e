"""Where and in which numbers to compute. It knows torch and the machine, no model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from headrace.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Placement:
    """The device, the type in which weights are kept, and the one in which sums are made."""

    device: torch.device
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype


def place(device: str, dtype: str, *, deterministic: bool = False) -> Placement:
    """Resolve "auto". Raises StartupError for an unknown or absent device or type.

    "auto" is bfloat16 everywhere. Where a CPU multiplies bfloat16 natively
    (AVX512-BF16, AMX), activations and KV cache are bfloat16 too. Elsewhere a
    matrix product in bfloat16 is emulated, 8 times slower than in float32 at 512
    rows on an AVX2 machine (5,800 and 690 ms for SmolLM2's linear layers), so
    activations and KV are float32 and only weights bfloat16; layers/linear.py
    says how they are multiplied. So it is on every CPU if `deterministic`, since
    only our own kernels promise the order of their sums.
    """
    chosen = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise StartupError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}")
    weight_dtype = DTYPES.get(dtype, torch.bfloat16)
    native = chosen.type != "cpu" or (_cpu_multiplies_bfloat16() and not deterministic)
    return Placement(chosen, weight_dtype, weight_dtype if native else torch.float32)


def on_device(device: torch.device, *values: Iterable[int]) -> tuple[torch.Tensor, ...]:
    """Each of `values` as a tensor of int64, all in one copy that the host does not wait for.

    Pinned memory that a copy still reads is not given out again: torch's allocator of
    pinned memory sees to that.
    """
    parts = [list(part) for part in values]
    packed = torch.tensor(
        list(chain.from_iterable(parts)), dtype=torch.int64, pin_memory=device.type == "cuda"
    )
    there = packed.to(device, non_blocking=True)
    return torch.split_with_sizes(there, [len(part) for part in parts])


def use_threads(count: int) -> None:
    """Compute on `count` CPU threads; 0: one per core that this process may use."""
    if count < 0:
        raise StartupError(f"num_threads must be 0 or more, not {count}")
    # Not every system tells which cores a process may use.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(count or allowed or 1)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartupError(f"device must be auto, cpu or cuda[:N], not {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartupError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise StartupError(f"device must be auto, cpu or cuda[:N], not {name!r}")
    return device


def _cpu_multiplies_bfloat16() -> bool:
    # Without a leading underscore torch 2.11 to 2.13 offer no such question.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in questions)
