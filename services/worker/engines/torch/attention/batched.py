"""Attention with all decoding sequences at once, for devices where launches cost more than bytes.

What prefills goes one sequence after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.attention.decode import Decodes, decode_way
from services.worker.engines.torch.attention.prefill import prefill
from services.worker.engines.torch.attention.spans import slots_of
from services.worker.engines.torch.device import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engines.torch.attention.cache import KVCache
    from services.worker.engines.torch.attention.spans import Span


class BatchedAttention:
    """See Attend. Cache slots that nobody wrote must hold finite numbers."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        # Decoding sequences come first in a plan.
        count = next((i for i, span in enumerate(spans) if span.num_rows > 1), len(spans))
        decodes, self._prefills = spans[:count], spans[count:]
        width = max((len(span.blocks) for span in decodes), default=0)
        padding = [cache.spare_block] * width
        self._slots, positions, tables, *self._blocks = on_device(
            cache.device,
            slots_of(spans, cache.block_size),
            [span.start for span in decodes],
            [block for span in decodes for block in (span.blocks + padding)[:width]],
            *[span.blocks for span in self._prefills],
        )
        self._decodes = Decodes(tables.view(count, width), positions)
        self._way = decode_way(cache.device)

    def __call__(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """See Attend."""
        cache = self._cache
        options = cache.attention[layer]
        cache.write(layer, self._slots, key_value)
        count = len(self._decodes.positions)
        parts = []
        if count:
            parts.append(self._way(cache.layers[layer], query[:count], self._decodes, options))
        for span, blocks in zip(self._prefills, self._blocks, strict=True):
            stored = cache.read(layer, blocks, span.end)
            parts.append(prefill(stored, query[span.first : span.first + span.num_rows], options))
        return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
