"""Mixtral: Mistral with experts for feed-forward (https://arxiv.org/abs/2401.04088).

GGUF files of Mixtral say that they are Llama, with experts. Shapes: see decoder.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.engines.torch.models.decoder import Block, Decoder
from services.worker.engines.torch.models.llama import Attention
from services.worker.engines.torch.models.names import (
    GGUF_ATTENTION,
    GGUF_EXPERTS,
    GgufNaming,
    Naming,
)

if TYPE_CHECKING:
    from headrace.models.files import Format
    from services.worker.engines.torch.layers import Builder
    from services.worker.model_config import ModelConfig

_GGUF_BLOCK_NAMES = GGUF_ATTENTION | GGUF_EXPERTS | {"ffn_norm": "post_attention_layernorm"}
#: Hugging Face's names of an expert's weights, and ours.
_EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def _block(args: ModelConfig, build: Builder, layer: int) -> Block:
    assert args.experts is not None
    experts = build.experts(f"model.layers.{layer}.mlp", args.hidden_size, args.experts)
    return Block(args, build, layer, Attention(args, build, layer), experts)


class Mixtral(Decoder):
    """The model."""

    def __init__(self, args: ModelConfig, build: Builder) -> None:
        super().__init__(args, build, _block)

    @staticmethod
    def naming(file_format: Format, args: ModelConfig) -> Naming:
        """How a file of this format names and arranges the weights."""
        if file_format == "gguf":
            return GgufNaming(_GGUF_BLOCK_NAMES, permuted_heads=args.head_dim)
        return _HuggingFaceNaming(tied=args.tie_embeddings)


class _HuggingFaceNaming(Naming):
    """`block_sparse_moe` is our `mlp`."""

    def rename(self, name: str) -> str | None:
        """See Naming.rename."""
        ours = super().rename(name.replace(".block_sparse_moe.", ".mlp."))
        if ours is None:
            return None
        stem, _, last = ours.rpartition(".")
        return f"{stem}.{_EXPERT_NAMES[last]}" if last in _EXPERT_NAMES else ours
