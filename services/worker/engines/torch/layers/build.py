"""Builds layers from named weights on a device; models say only which and how large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from services.worker.engines.torch.layers.embedding import Embedding
from services.worker.engines.torch.layers.linear import Linear, linear
from services.worker.engines.torch.layers.norm import RMSNorm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.worker.engines.torch.device import Placement


class TensorSource(Protocol):
    """Where weights come from."""

    def take(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`, whose shape is the expected one. Raises StartupError if it can't."""


class Builder:
    """Takes each weight once from `source` and makes layers on `placement`."""

    def __init__(self, source: TensorSource, placement: Placement) -> None:
        self._source = source
        self.placement = placement

    def linear(self, in_features: int, parts: Mapping[str, int]) -> Linear:
        """One layer of several weights, name -> rows, whose outputs stand side by side."""
        fused = self._empty(sum(parts.values()), in_features)
        start = 0
        for name, rows in parts.items():
            self._source.take(name, fused[start : start + rows])
            start += rows
        return linear(fused.to(self.placement.device), self.placement)

    def tied_linear(self, embedding: Embedding) -> Linear:
        """The output projection of a model whose output weights are its embedding."""
        return linear(embedding.weight, self.placement)

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> Embedding:
        """Token embeddings."""
        weight = self._empty(vocab_size, hidden_size)
        self._source.take(name, weight)
        return Embedding(weight.to(self.placement.device), self.placement.compute_dtype)

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        """An RMS norm."""
        weight = torch.empty(size, dtype=self.placement.compute_dtype)
        self._source.take(name, weight)
        return RMSNorm(weight.to(self.placement.device), eps)

    def _empty(self, rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=self.placement.weight_dtype)
