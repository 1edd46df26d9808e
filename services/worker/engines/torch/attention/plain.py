"""Attention as its formula says, one sequence and one head at a time, in float32.

softmax(q kᵀ / sqrt(head_dim)) v over positions not after the query's own
(https://arxiv.org/abs/1706.03762), query heads in groups that share a key and
value head (https://arxiv.org/abs/2305.13245), changed by a layer's window, scale
and soft cap (LayerAttention). The reference for the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.attention.spans import slots_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engines.torch.attention.cache import KVCache
    from services.worker.engines.torch.attention.spans import Span


class PlainAttention:
    """See Attend."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        self._spans = spans
        self._slots = torch.tensor(slots_of(spans, cache.block_size), device=cache.device)

    def __call__(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """See Attend."""
        self._cache.write(layer, self._slots, key_value)
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        kv_heads = self._cache.num_kv_heads
        options = self._cache.attention[layer]
        scale = query.shape[2] ** -0.5 if options.scale is None else options.scale
        group = query.shape[1] // kv_heads
        for span in self._spans:
            index = torch.tensor(span.blocks, device=query.device)
            stored = self._cache.read(layer, index, span.end).float()
            positions = torch.arange(span.end, device=query.device)
            distance = positions[span.start :, None] - positions[None, :]
            hidden = distance < 0
            if options.window is not None:
                hidden |= distance >= options.window
            rows = slice(span.first, span.first + span.num_rows)
            for head in range(query.shape[1]):
                keys, values = stored[head // group], stored[kv_heads + head // group]
                scores = query[rows, head].float() @ keys.T * scale
                if options.soft_cap is not None:
                    scores = (scores / options.soft_cap).tanh() * options.soft_cap
                weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
                result[rows, head] = (weights @ values).to(query.dtype)
        return result
