"""Builds layers from named weights on a device; models say only which and how large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from services.worker.engines.torch.layers.bias import BiasedLinear
from services.worker.engines.torch.layers.embedding import Embedding
from services.worker.engines.torch.layers.feed_forward import Experts, GatedMLP, silu
from services.worker.engines.torch.layers.linear import Linear, linear
from services.worker.engines.torch.layers.norm import HeadNorm, RMSNorm
from services.worker.engines.torch.layers.rope import Rope

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.worker.engines.torch.device import Placement
    from services.worker.model_config import ExpertConfig, RopeConfig


class TensorSource(Protocol):
    """Where weights come from."""

    def take(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`, whose shape is the expected one. Raises StartupError if it can't."""


class Builder:
    """Takes each weight once from `source` and makes layers on `placement`."""

    def __init__(self, source: TensorSource, placement: Placement) -> None:
        self._source = source
        self.placement = placement

    def linear(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> Linear:
        """One layer of several weights, name -> rows, whose outputs stand side by side.

        With `bias`, each part has one, under its name and `.bias`.
        """
        rows = sum(parts.values())
        fused = torch.empty(rows, in_features, dtype=self.placement.weight_dtype)
        self._take_rows(fused, parts)
        layer = linear(fused.to(self.placement.device), self.placement)
        if not bias:
            return layer
        biases = torch.empty(rows, dtype=self.placement.compute_dtype)
        self._take_rows(biases, {f"{name}.bias": count for name, count in parts.items()})
        return BiasedLinear(layer, biases.to(self.placement.device))

    def tied_linear(self, embedding: Embedding) -> Linear:
        """The output projection of a model whose output weights are its embedding."""
        return linear(embedding.weight, self.placement)

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> Embedding:
        """Token embeddings."""
        weight = torch.empty(vocab_size, hidden_size, dtype=self.placement.weight_dtype)
        self._source.take(name, weight)
        return Embedding(weight.to(self.placement.device), self.placement.compute_dtype)

    def norm(self, name: str, size: int, eps: float, dtype: torch.dtype | None = None) -> RMSNorm:
        """An RMS norm, computed in `dtype`, by default the compute type."""
        weight = torch.empty(size, dtype=dtype or self.placement.compute_dtype)
        self._source.take(name, weight)
        return RMSNorm(weight.to(self.placement.device), eps)

    def head_norm(
        self,
        parts: Mapping[str, int],
        head_dim: int,
        eps: float,
        dtype: torch.dtype | None = None,
    ) -> HeadNorm:
        """An RMS norm of heads that stand side by side, name of a weight -> its heads."""
        weight = torch.empty(
            sum(parts.values()), head_dim, dtype=dtype or self.placement.compute_dtype
        )
        start = 0
        for name, heads in parts.items():
            self._source.take(name, weight[start])
            weight[start + 1 : start + heads] = weight[start]
            start += heads
        return HeadNorm(weight.to(self.placement.device), eps)

    def mlp(
        self,
        name: str,
        hidden_size: int,
        size: int,
        activate: Callable[[torch.Tensor], torch.Tensor] = silu,
    ) -> GatedMLP:
        """A gated feed-forward whose weights are called as in most checkpoints."""
        return GatedMLP(
            self.linear(hidden_size, {f"{name}.gate_proj": size, f"{name}.up_proj": size}),
            self.linear(size, {f"{name}.down_proj": hidden_size}),
            size,
            activate,
        )

    def experts(self, name: str, hidden_size: int, config: ExpertConfig) -> Experts:
        """Experts `name.experts.N` and their router `name.gate`."""
        return Experts(
            self.linear(hidden_size, {f"{name}.gate": config.num_experts}),
            [
                self.mlp(f"{name}.experts.{number}", hidden_size, config.intermediate_size)
                for number in range(config.num_experts)
            ],
            config.num_experts_per_token,
            normalize=config.normalize,
        )

    def rope(self, config: RopeConfig, context_len: int) -> Rope:
        """Rotary embedding for sequences of at most `context_len` tokens."""
        return Rope(config, context_len, self.placement)

    def _take_rows(self, out: torch.Tensor, parts: Mapping[str, int]) -> None:
        start = 0
        for name, rows in parts.items():
            self._source.take(name, out[start : start + rows])
            start += rows
