"""Attention of rows that decode, all at once, from tensors that may be a graph's inputs.

Nothing here depends on a value that lies on the device: shapes alone decide what is
launched, so that a CUDA graph can replay it. `decode_way` chooses between a kernel
that reads KV where it lies (paged_kernel.py) and, where there is no Triton, products
over gathered copies.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engines.torch.attention.cache import KVCache
    from services.worker.model_config import LayerAttention

#: Positions that are gathered at a time: what a copy takes is bounded, however many rows.
GATHERED_POSITIONS = 1 << 15


class Decodes(NamedTuple):
    """Rows of one token each, in one KV group. What lies behind a row's end may be any block."""

    #: [rows, width] int64: the physical blocks of each row's sequence.
    tables: torch.Tensor
    #: [rows] int64: where each row stands; it sees what stands at or before that.
    positions: torch.Tensor

    def slots(self, block_size: int) -> torch.Tensor:
        """Where each row's KV is stored: [rows] int64."""
        blocks = self.tables.gather(1, (self.positions // block_size)[:, None]).squeeze(1)
        return blocks * block_size + self.positions % block_size


#: (stored [2K, blocks, block_size, D], query [rows, H, D], decodes, options) -> as query.
DecodeWay = Callable[[torch.Tensor, torch.Tensor, Decodes, "LayerAttention"], torch.Tensor]


def decode_way(device: torch.device) -> DecodeWay:
    """The fastest way on this device."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from services.worker.engines.torch.attention.paged_kernel import paged_decode

        return paged_decode
    return gathered_decode


class DecodeAttention:
    """See Attend, for a step of decoding rows alone; one of `groups` for each KV group.

    Cache slots that nobody wrote must hold finite numbers.
    """

    def __init__(
        self, cache: KVCache, groups: Sequence[Decodes], way: DecodeWay | None = None
    ) -> None:
        self._cache = cache
        self._groups = groups
        self._slots = [group.slots(cache.block_size) for group in groups]
        self._way = way or decode_way(cache.device)

    def __call__(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """See Attend."""
        cache = self._cache
        group = cache.group_of[layer]
        cache.write(layer, self._slots[group], key_value)
        return self._way(cache.layers[layer], query, self._groups[group], cache.attention[layer])


def gathered_decode(
    stored: torch.Tensor, query: torch.Tensor, decodes: Decodes, options: LayerAttention
) -> torch.Tensor:
    """See DecodeWay. KV is gathered for as many rows at a time as the bound allows."""
    tables, positions = decodes
    rows = max(1, GATHERED_POSITIONS // (tables.shape[1] * stored.shape[2]))
    pieces = [
        _gathered(stored, query[at : at + rows], tables[at : at + rows],
                  positions[at : at + rows], options)
        for at in range(0, len(query), rows)
    ]  # fmt: skip
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _gathered(
    stored: torch.Tensor,
    query: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    options: LayerAttention,
) -> torch.Tensor:
    count, _, head_dim = query.shape
    kv_heads = len(stored) // 2
    near = stored.index_select(1, tables.flatten()).view(2, kv_heads, count, -1, head_dim)
    keys, values = near.transpose(1, 2)  # [rows, K, length, D]
    scale = head_dim**-0.5 if options.scale is None else options.scale
    grouped = query.reshape(count, kv_heads, -1, head_dim) * scale
    scores = torch.matmul(grouped, keys.transpose(2, 3))  # [rows, K, group, length]
    if options.soft_cap is not None:
        scores = (scores / options.soft_cap).tanh_() * options.soft_cap
    distance = positions[:, None] - torch.arange(keys.shape[2], device=query.device)
    hidden = distance < 0
    if options.window is not None:
        hidden |= distance >= options.window
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    return torch.matmul(scores.softmax(-1), values).reshape(query.shape)
