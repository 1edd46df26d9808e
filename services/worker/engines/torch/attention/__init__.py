"""Attention over a paged KV cache: the cache, the step's spans, the ways to attend.

`ATTENTION` is the table of ways. `plain` is the reference that says what the
others must compute.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from services.worker.engines.torch.attention.cache import KVCache, bytes_per_position, kv_groups
from services.worker.engines.torch.attention.decode import DecodeAttention, Decodes
from services.worker.engines.torch.attention.spans import Span, spans_of
from services.worker.engines.torch.kernels import kernels

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from services.worker.plan import StepPlan


ATTENTION = {
    "plain": "services.worker.engines.torch.attention.plain:PlainAttention",
    "per_sequence": "services.worker.engines.torch.attention.per_sequence:PerSequenceAttention",
    "compiled": "services.worker.engines.torch.attention.compiled:CompiledAttention",
    "batched": "services.worker.engines.torch.attention.batched:BatchedAttention",
}


class Attend(Protocol):
    """One step's attention."""

    def __call__(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """Store this layer's keys and values, then attend to those stored before.

        Causally, and as `cache.attention[layer]` says (LayerAttention).

        Shapes: query [tokens, heads, head_dim]; key_value [tokens, 2 · kv_heads,
        head_dim], keys first, both rotated; result as query, contiguous.
        """


#: What the table's entries are: a step's attention is made of its cache and spans.
Way = Callable[[KVCache, "Sequence[Span]"], Attend]


def attention_class(name: str) -> Way:
    """An entry of `ATTENTION`."""
    module, _, attribute = ATTENTION[name].partition(":")
    found: Way = getattr(import_module(module), attribute)
    return found


def attend_step(chosen: Way, cache: KVCache, plan: StepPlan) -> Attend:
    """A step's attention over all layers, each with the block tables of its KV group."""
    size = cache.block_size
    ways = [chosen(cache, spans_of(plan, size, group)) for group in range(len(cache.groups))]
    if len(ways) == 1:
        return ways[0]

    def attend(layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        return ways[cache.group_of[layer]](layer, query, key_value)

    return attend


def best_attention(cache: KVCache) -> str:
    """The fastest entry of `ATTENTION` for this device and these heads."""
    if cache.device.type != "cpu":
        return "batched"
    return "compiled" if cache.suits_kernel and kernels() is not None else "per_sequence"


__all__ = [
    "ATTENTION",
    "Attend",
    "DecodeAttention",
    "Decodes",
    "KVCache",
    "Span",
    "attend_step",
    "attention_class",
    "best_attention",
    "bytes_per_position",
    "kv_groups",
    "spans_of",
]
