"""RMS normalisation (https://arxiv.org/abs/1910.07467), in the type of the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from services.worker.engines.torch.kernels import kernels


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps
        self._shape = tuple(weight.shape)
        takes = weight.device.type == "cpu" and weight.dtype == torch.float32
        self._kernels = kernels() if takes and len(weight) % 8 == 0 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None and x.dtype == torch.float32:
            return self._kernels.rms_norm(x, self._weight, self._eps)
        wide = x.to(self._weight.dtype)
        return F.rms_norm(wide, self._shape, self._weight, self._eps).to(x.dtype)


class HeadNorm:
    """RMS norm of each head, in place. Shapes: weight [heads, head_dim]."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, heads: torch.Tensor) -> None:
        """Normalise `heads`, [tokens, heads, head_dim]."""
        wide = heads.to(self._weight.dtype)
        normed = F.rms_norm(wide, (heads.shape[-1],), None, self._eps)
        heads.copy_(normed.mul_(self._weight))
