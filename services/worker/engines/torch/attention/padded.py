"""Attention with all decoding sequences at once, for devices where launches cost more than bytes.

The decoding sequences' KV is gathered through a block table padded to the
longest; what prefills goes one sequence after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.attention.per_sequence import PerSequenceAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engines.torch.attention.cache import KVCache
    from services.worker.engines.torch.attention.spans import Span


class PaddedAttention:
    """See Attend. Cache slots that nobody wrote must hold finite numbers."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        # Decoding sequences come first in a plan.
        self._num_decodes = next(
            (i for i, span in enumerate(spans) if span.num_rows > 1), len(spans)
        )
        decodes = spans[: self._num_decodes]
        self._rest = PerSequenceAttention(
            cache,
            [s._replace(first=s.first - self._num_decodes) for s in spans[self._num_decodes :]],
        )
        longest = max((len(span.blocks) for span in decodes), default=0)
        tables = [span.blocks + [0] * (longest - len(span.blocks)) for span in decodes]
        self._tables = torch.tensor(tables, dtype=torch.long, device=cache.device).flatten()
        ends = torch.tensor([span.end for span in decodes], device=cache.device)
        self._slots = torch.tensor(
            [s.blocks[s.start // cache.block_size] * cache.block_size + s.start % cache.block_size
             for s in decodes], dtype=torch.long, device=cache.device,
        )  # fmt: skip
        positions = torch.arange(longest * cache.block_size, device=cache.device)
        self._distance = (ends[:, None] - 1 - positions)[:, None, None]  # [B, 1, 1, longest]
        self._hidden = {
            window: self._distance_hides(window) for window in {a.window for a in cache.attention}
        }

    def _distance_hides(self, window: int | None) -> torch.Tensor:
        hidden = self._distance < 0
        return hidden if window is None else hidden | (self._distance >= window)

    def __call__(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """See Attend."""
        count = self._num_decodes
        if count == 0:
            return self._rest(layer, query, key_value)
        mixed = self._decode(layer, query[:count], key_value[:count])
        if count == len(query):
            return mixed
        return torch.cat((mixed, self._rest(layer, query[count:], key_value[count:])))

    def _decode(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        cache = self._cache
        options = cache.attention[layer]
        cache.write(layer, self._slots, key_value)
        count, _, head_dim = query.shape
        stored = cache.layers[layer].index_select(1, self._tables)
        stored = stored.view(2, cache.num_kv_heads, count, -1, head_dim)
        keys, values = stored.transpose(1, 2)  # [B, K, longest, D]
        scale = head_dim**-0.5 if options.scale is None else options.scale
        groups = query.reshape(count, cache.num_kv_heads, -1, head_dim) * scale
        scores = torch.matmul(groups, keys.transpose(2, 3))  # [B, K, group, longest]
        if options.soft_cap is not None:
            scores = (scores / options.soft_cap).tanh_() * options.soft_cap
        weights = scores.masked_fill_(self._hidden[options.window], float("-inf")).softmax(-1)
        return torch.matmul(weights, values).reshape(query.shape)
