"""Attention one sequence after the other, for CPUs.

A sequence's KV is read where it lies, if its blocks are consecutive, else gathered
(at 540 tokens that makes decoding 1.7 times as long; gathering only what is not
consecutive gained nothing). Decoding is plain matrix products, a query head's
group as rows; torch's fused attention takes 1.6 times as long there. Prefill is
the fused attention in slices of queries, so that little above the diagonal is
computed and no score matrix is large. A layer's window cuts what both read.
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
    from services.worker.model_config import LayerAttention

#: Queries of a slice.
_SLICE = 128


class _Slice(NamedTuple):
    """Rows `first` to `last`, which see positions `begin` to `end`, those of `mask` (additive)."""

    first: int
    last: int
    begin: int
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
        prefills = [span for span in spans if span.num_rows > 1]
        dtype = cache.layers[0].dtype
        #: By window, as a layer's slices depend on it.
        self._prefills = {
            window: [
                (cache.locate(span.blocks), span.end, _slices(span, window, dtype, cache.device))
                for span in prefills
            ]
            for window in {options.window for options in cache.attention}
        }

    def __call__(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """See Attend."""
        self._cache.write(layer, self._slots, key_value)
        options = self._cache.attention[layer]
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for where, end, row in self._decodes:
            stored = self._cache.read(layer, where, end)
            if options.window is not None:
                stored = stored[:, max(0, end - options.window) :]
            _decode(stored, query[row], result[row], options)
        for where, end, slices in self._prefills[options.window]:
            _prefill(self._cache.read(layer, where, end), query, slices, result, options)
        return result


def _decode(
    stored: torch.Tensor, query: torch.Tensor, result: torch.Tensor, options: LayerAttention
) -> None:
    """One query over all positions. Shapes: stored [2K, seen, D], query and result [H, D]."""
    keys, values = stored.chunk(2)
    scale = query.shape[1] ** -0.5 if options.scale is None else options.scale
    groups = query.view(len(keys), -1, query.shape[1]) * scale
    scores = torch.bmm(groups, keys.transpose(1, 2))  # [K, group, seen]
    if options.soft_cap is not None:
        scores = scores.div_(options.soft_cap).tanh_().mul_(options.soft_cap)
    torch.bmm(scores.softmax(-1), values, out=result.view(groups.shape))


def _prefill(
    stored: torch.Tensor,
    query: torch.Tensor,
    slices: list[_Slice],
    result: torch.Tensor,
    options: LayerAttention,
) -> None:
    """Several queries of one sequence.

    Shapes: stored [2K, end, D], query and result [tokens, H, D].
    """
    keys, values = stored[None].chunk(2, 1)
    for first, last, begin, end, mask in slices:
        rows = query[None, first:last].transpose(1, 2)  # [1, H, rows, D]
        seen = keys[:, :, begin:end], values[:, :, begin:end]
        if options.soft_cap is None:
            mixed = F.scaled_dot_product_attention(
                rows, *seen, attn_mask=mask, scale=options.scale, enable_gqa=True
            )
        else:
            mixed = _capped(rows, *seen, mask, options)
        result[first:last] = mixed[0].transpose(0, 1)


def _capped(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    options: LayerAttention,
) -> torch.Tensor:
    """What the fused attention lacks: scores behind a soft cap. Shapes as there."""
    assert options.soft_cap is not None
    scale = rows.shape[-1] ** -0.5 if options.scale is None else options.scale
    groups = rows.reshape(1, keys.shape[1], -1, *rows.shape[2:]) * scale  # [1, K, group, rows, D]
    scores = torch.matmul(groups, keys.unsqueeze(2).transpose(3, 4))
    scores = scores.div_(options.soft_cap).tanh_().mul_(options.soft_cap).add_(mask)
    return torch.matmul(scores.softmax(-1), values.unsqueeze(2)).flatten(1, 2)


def _slices(
    span: Span, window: int | None, dtype: torch.dtype, device: torch.device
) -> list[_Slice]:
    slices = []
    for offset in range(0, span.num_rows, _SLICE):
        last = min(offset + _SLICE, span.num_rows)
        end = span.start + last
        first_position = span.start + offset
        begin = 0 if window is None else max(0, first_position - window + 1)
        mask = torch.full((last - offset, end - begin), float("-inf"), dtype=dtype, device=device)
        mask.triu_(first_position - begin + 1)
        if window is not None:
            too_far = torch.ones_like(mask, dtype=torch.bool).tril_(first_position - begin - window)
            mask.masked_fill_(too_far, float("-inf"))
        slices.append(_Slice(span.first + offset, span.first + last, begin, end, mask))
    return slices
