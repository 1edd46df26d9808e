"""Attention over a paged KV cache: the cache, the step's spans, the ways to attend.

`ATTENTION` is the table of ways. `plain` is the reference that says what the
others must compute.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from services.worker.engines.torch.attention.cache import KVCache
from services.worker.engines.torch.attention.spans import Span, spans_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

ATTENTION = {
    "plain": "services.worker.engines.torch.attention.plain:PlainAttention",
    "per_sequence": "services.worker.engines.torch.attention.per_sequence:PerSequenceAttention",
    "padded": "services.worker.engines.torch.attention.padded:PaddedAttention",
}


class Attend(Protocol):
    """One step's attention. Built once a step with `AttentionClass(cache, spans)`."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None: ...

    def __call__(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """Store this layer's keys and values, then attend causally to all that are stored.

        Shapes: query [tokens, heads, head_dim]; key_value [tokens, 2 · kv_heads,
        head_dim], keys first, both rotated; result as query, contiguous.
        """


def attention_class(name: str) -> type[Attend]:
    """An entry of `ATTENTION`."""
    module, _, attribute = ATTENTION[name].partition(":")
    found: type[Attend] = getattr(import_module(module), attribute)
    return found


__all__ = ["ATTENTION", "Attend", "KVCache", "Span", "attention_class", "spans_of"]
