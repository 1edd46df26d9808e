"""Attention of several queries of one sequence, for devices with fused attention.

Where the fused attention knows "causal, aligned to the last key", one call does all
and keeps no score matrix. Elsewhere (windows, soft caps, float32) queries go in
slices, so that a slice's scores and mask stay under a bound, even if all of them
were kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right

if TYPE_CHECKING:
    from services.worker.model_config import LayerAttention

#: Scores of a slice, over all heads.
SLICE_SCORES = 1 << 26


def prefill(stored: torch.Tensor, query: torch.Tensor, options: LayerAttention) -> torch.Tensor:
    """Attend from the last positions of a sequence to all that it has.

    Shapes: stored [2K, end, D], query [rows, H, D], rows ≤ end -> as query.
    """
    rows = query.transpose(0, 1)[None]  # [1, H, rows, D]
    keys, values = stored[None].chunk(2, 1)  # [1, K, end, D]
    if options.window is None and options.soft_cap is None and _has_flash(rows, keys, values):
        bias = causal_lower_right(len(query), stored.shape[1])
        mixed = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=bias, scale=options.scale, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)
    return _sliced(rows, keys, values, options)


def _has_flash(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    if query.device.type != "cuda":
        return False
    # Not causal, as the alignment is to the last key: what is asked is the rest.
    params = SDPAParams(query, keys, values, None, 0.0, False, True)
    return bool(can_use_flash_attention(params))


def _sliced(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: LayerAttention
) -> torch.Tensor:
    """Shapes: [1, H, rows, D], [1, K, end, D] twice -> [rows, H, D]."""
    heads, num_rows, end = query.shape[1], query.shape[2], keys.shape[2]
    group = heads // keys.shape[1]
    size = max(16, SLICE_SCORES // (heads * end))
    result = torch.empty_like(query[0].transpose(0, 1), memory_format=torch.contiguous_format)
    for at in range(0, num_rows, size):
        until = min(at + size, num_rows)
        first, last = end - num_rows + at, end - num_rows + until
        begin = 0 if options.window is None else max(0, first - options.window + 1)
        # Not every backend of the fused attention takes groups.
        seen = [kv[:, :, begin:last].repeat_interleave(group, 1) for kv in (keys, values)]
        distance = torch.arange(first, last, device=query.device)[:, None] - torch.arange(
            begin, last, device=query.device
        )
        visible = distance >= 0
        if options.window is not None:
            visible &= distance < options.window
        mixed = _attend(query[:, :, at:until], seen[0], seen[1], visible, options)
        result[at:until] = mixed[0].transpose(0, 1)
    return result


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    options: LayerAttention,
) -> torch.Tensor:
    """Shapes: [1, H, rows, D], [1, H, seen, D] twice, [rows, seen] -> as query."""
    if options.soft_cap is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=options.scale
        )
    scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
    scores = torch.matmul(query * scale, keys.transpose(2, 3))  # [1, H, rows, seen]
    scores = scores.div_(options.soft_cap).tanh_().mul_(options.soft_cap)
    weights = scores.masked_fill_(~visible, float("-inf")).softmax(-1)
    return torch.matmul(weights, values)
