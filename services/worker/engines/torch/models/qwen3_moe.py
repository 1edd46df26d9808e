"""Qwen 3 with experts for feed-forward (https://arxiv.org/abs/2505.09388).

Some layers may have one feed-forward for all tokens. Shapes: see decoder.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.engines.torch.models.decoder import Block, Decoder
from services.worker.engines.torch.models.names import (
    GGUF_ATTENTION,
    GGUF_EXPERTS,
    GGUF_MLP,
    GgufNaming,
    Naming,
)
from services.worker.engines.torch.models.qwen3 import GGUF_HEAD_NORMS, Attention

if TYPE_CHECKING:
    from headrace.models.files import Format
    from services.worker.engines.torch.layers import Builder, Experts
    from services.worker.model_config import ModelConfig


def _block(args: ModelConfig, build: Builder, layer: int) -> Block:
    assert args.experts is not None
    experts: Experts | None = None
    if layer not in args.experts.dense_layers:
        experts = build.experts(f"model.layers.{layer}.mlp", args.hidden_size, args.experts)
    return Block(args, build, layer, Attention(args, build, layer), experts)


class Qwen3Moe(Decoder):
    """The model."""

    def __init__(self, args: ModelConfig, build: Builder) -> None:
        super().__init__(args, build, _block)

    @staticmethod
    def naming(file_format: Format, args: ModelConfig) -> Naming:
        """How a file of this format names and arranges the weights."""
        if file_format == "gguf":
            return GgufNaming(GGUF_ATTENTION | GGUF_HEAD_NORMS | GGUF_MLP | GGUF_EXPERTS)
        return Naming(tied=args.tie_embeddings)
