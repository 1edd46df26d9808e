"""Attention one sequence after the other, for CPUs.

A sequence's KV is read where it lies, if its blocks are consecutive, else gathered
(at 540 tokens that makes decoding 1.7 times as long; gathering only what is not
consecutive gained nothing). Decoding is plain matrix products, a query head's
group as rows; torch's fused attention takes 1.6 times as long there. Prefill is
the fused attention in slices of queries, so that little above the diagonal is
computed and no score matrix is large.
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
        # Where a sequence's KV lies and how long it is, then its row or rows.
        self._decodes = [
            (cache.locate(span.blocks), span.end, span.first)
            for span in spans
            if span.num_rows == 1
        ]
        dtype = cache.layers[0].dtype
        self._prefills = [
            (cache.locate(span.blocks), span.end, _slices(span, dtype, cache.device))
            for span in spans
            if span.num_rows > 1
        ]

    def __call__(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """See Attend."""
        self._cache.write(layer, self._slots, key_value)
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for where, end, row in self._decodes:
            self._decode(self._cache.read(layer, where, end), query[row], result[row])
        for where, end, slices in self._prefills:
            self._prefill(self._cache.read(layer, where, end), query, slices, result)
        return result

    def _decode(self, stored: torch.Tensor, query: torch.Tensor, result: torch.Tensor) -> None:
        """One query over all positions. Shapes: stored [2K, end, D], query and result [H, D]."""
        keys, values = stored.chunk(2)
        groups = query.view(len(keys), -1, query.shape[1]) * query.shape[1] ** -0.5
        weights = torch.bmm(groups, keys.transpose(1, 2)).softmax(-1)  # [K, group, end]
        torch.bmm(weights, values, out=result.view(groups.shape))

    def _prefill(
        self,
        stored: torch.Tensor,
        query: torch.Tensor,
        slices: list[_Slice],
        result: torch.Tensor,
    ) -> None:
        """Several queries of one sequence.

        Shapes: stored [2K, end, D], query and result [tokens, H, D].
        """
        keys, values = stored[None].chunk(2, 1)
        for first, last, end, mask in slices:
            mixed = F.scaled_dot_product_attention(
                query[None, first:last].transpose(1, 2),  # [1, H, rows, D]
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=mask,
                enable_gqa=True,
            )
            result[first:last] = mixed[0].transpose(0, 1)


def _slices(span: Span, dtype: torch.dtype, device: torch.device) -> list[_Slice]:
    slices = []
    for offset in range(0, span.num_rows, _SLICE):
        last = min(offset + _SLICE, span.num_rows)
        end = span.start + last
        mask = torch.full((last - offset, end), float("-inf"), dtype=dtype, device=device)
        mask.triu_(span.start + offset + 1)
        slices.append(_Slice(span.first + offset, span.first + last, end, mask))
    return slices
