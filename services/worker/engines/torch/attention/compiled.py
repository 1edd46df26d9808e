"""Attention by the CPU's compiled kernel: all rows of a step at once, KV where it lies.

A query's result is bit-identical in any batch and any chunking, see kernels.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.attention.spans import slots_of
from services.worker.engines.torch.kernels import ROWS_PER_TILE, Tiles, kernels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engines.torch.attention.cache import KVCache
    from services.worker.engines.torch.attention.spans import Span


class CompiledAttention:
    """See Attend. Needs `kernels()`, and a cache that `suits_kernel`."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        found = kernels()
        assert found is not None
        self._kernels = found
        self._cache = cache
        self._slots = torch.tensor(slots_of(spans, cache.block_size))
        self._tiles = _tiles(spans)

    def __call__(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """See Attend."""
        stored = self._cache.slots[layer]
        options = self._cache.attention[layer]
        self._kernels.store(key_value, stored, self._slots)
        return self._kernels.attend(
            query,
            stored,
            self._tiles,
            block_size=self._cache.block_size,
            window=options.window,
            scale=query.shape[2] ** -0.5 if options.scale is None else options.scale,
            soft_cap=options.soft_cap,
        )


def _tiles(spans: Sequence[Span]) -> Tiles:
    tiles: list[tuple[int, int, int, int]] = []
    blocks: list[int] = []
    for span in spans:
        tiles += [
            (span.first + offset, min(ROWS_PER_TILE, span.num_rows - offset), span.start + offset,
             len(blocks))
            for offset in range(0, span.num_rows, ROWS_PER_TILE)
        ]  # fmt: skip
        blocks += span.blocks
    return Tiles(torch.tensor(tiles), torch.tensor(blocks, dtype=torch.int32))
