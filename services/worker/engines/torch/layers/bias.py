"""A linear layer with a bias, around any without."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from services.worker.engines.torch.layers.linear import Linear


class BiasedLinear:
    """y = x Wᵀ + b. Shapes: [rows, in] -> [rows, out]; b [out], of compute type."""

    def __init__(self, inner: Linear, bias: torch.Tensor) -> None:
        self._inner = inner
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner(x).add_(self._bias)
