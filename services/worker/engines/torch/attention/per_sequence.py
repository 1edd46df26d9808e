"""Attention one sequence after the other, for CPUs.

A sequence's KV is read where it lies, if its blocks are consecutive (they are
until the cache has been filled once), else gathered. Decoding is plain matrix
products, a query head's group as rows; torch's fused attention takes 1.6 times as
long there. Prefill is the fused attention in slices of queries, so that little
above the diagonal is computed and no score matrix is large.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from services.worker.engines.torch.attention.spans import slots_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engines.torch.attention.cache import KVCache
    from services.worker.engines.torch.attention.spans import Span

#: Queries of a slice.
_SLICE = 128


class _Slice(NamedTuple):
    """Rows `first` to `last`, which see positions below `end`, those of `mask` (additive)."""

    first: int
    last: int
    end: int
    mask: torch.Tensor


class PerSequenceAttention:
    """See Attend."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        self._slots = torch.tensor(slots_of(spans, cache.block_size), device=cache.device)
        dtype = cache.layers[0].dtype
        self._spans = [
            (span, span.run_start(), _slices(span, dtype, cache.device)) for span in spans
        ]

    def __call__(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """See Attend."""
        self._cache.write(layer, self._slots, key_value)
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        kv_heads, head_dim = self._cache.num_kv_heads, query.shape[2]
        for span, run_start, slices in self._spans:
            stored = self._cache.read(layer, span, run_start)
            keys, values = stored[:kv_heads], stored[kv_heads:]  # [K, end, D]
            if span.num_rows == 1:
                groups = query[span.first].view(kv_heads, -1, head_dim) * head_dim**-0.5
                weights = torch.bmm(groups, keys.transpose(1, 2)).softmax(-1)  # [K, group, end]
                torch.bmm(weights, values, out=result[span.first].view(groups.shape))
                continue
            for first, last, end, mask in slices:
                mixed = F.scaled_dot_product_attention(
                    query[None, first:last].transpose(1, 2),  # [1, H, rows, D]
                    keys[None, :, :end],
                    values[None, :, :end],
                    attn_mask=mask,
                    enable_gqa=True,
                )
                result[first:last] = mixed[0].transpose(0, 1)
        return result


def _slices(span: Span, dtype: torch.dtype, device: torch.device) -> list[_Slice]:
    if span.num_rows == 1:
        return []
    slices = []
    for offset in range(0, span.num_rows, _SLICE):
        last = min(offset + _SLICE, span.num_rows)
        end = span.start + last
        mask = torch.full((last - offset, end), float("-inf"), dtype=dtype, device=device)
        mask.triu_(span.start + offset + 1)
        slices.append(_Slice(span.first + offset, span.first + last, end, mask))
    return slices
