"""Linear layers: one interface, several ways to multiply, chosen in one place.

    PlainLinear      torch's own: CUDA, and CPUs that multiply bfloat16 natively
    CompiledLinear   on other CPUs, by our kernel, weights kept once in their own type
    PackedLinear     the same where there is no C compiler: float32, reordered for oneDNN
    TwinLinear       the same for bfloat16 weights, with the weights as they are for one row

Measured with SmolLM2's linear layers without the output projection, 2 threads of
an AVX2 machine, in ms per step:

    rows                          1     2     4     8    32   512
    compiled, bfloat16          7.2   8.8  10.8  14.8  44.4   661
    oneDNN, reordered, float32   19    19    23    28    61   682
    F.linear, bfloat16           12    22    44   110   450  5800

Quantized weights become entries here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

from services.worker.engines.torch.kernels import kernels

if TYPE_CHECKING:
    from services.worker.engines.torch.device import Placement
    from services.worker.engines.torch.kernels import Kernels


class Linear(Protocol):
    """y = x Wᵀ. Shapes: [rows, in] -> [rows, out], of the compute type."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


def linear(weight: torch.Tensor, placement: Placement) -> Linear:
    """The fastest linear layer for `weight`, [out, in], on this device. It may keep `weight`."""
    if placement.device.type != "cpu" or placement.compute_dtype != torch.float32:
        return PlainLinear(weight.to(placement.compute_dtype))
    if (found := kernels()) is not None:
        return CompiledLinear(found, weight)
    if not can_pack():
        return PlainLinear(weight.float())
    return TwinLinear(weight) if weight.dtype == torch.bfloat16 else PackedLinear(weight)


def can_pack() -> bool:
    """Whether this torch has oneDNN's reordered linear, which torch.compile uses on CPUs."""
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class PlainLinear:
    """torch's own product."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight)


class CompiledLinear:
    """float32 or bfloat16 weights in our kernel's order.

    A row's result is bit-identical whatever rows stand beside it.
    """

    def __init__(self, found: Kernels, weight: torch.Tensor) -> None:
        self._kernels = found
        self._packed = found.pack(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(x, self._packed)


class PackedLinear:
    """float32 weights in oneDNN's own order; they can't be read back cheaply."""

    def __init__(self, weight: torch.Tensor) -> None:
        # The packet's overload is resolved once: it costs 3 µs a call.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(weight.float(), None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._multiply(x, self._packed, None, "none", [], "")
        return result


class TwinLinear:
    """bfloat16 weights kept twice: as they are for one row, packed in float32 for more.

    One row is bound by memory, and half the bytes are read in half the time; the
    row is rounded to bfloat16 before and after, which more rows are not.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._packed = PackedLinear(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1:
            return self._packed(x)
        return F.linear(x.bfloat16(), self._weight).float()
