"""Qwen 3 with experts for feed-forward (https://arxiv.org/abs/2505.09388).

Some layers may have one feed-forward for all tokens. Shapes: see decoder.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.engines.torch.models.decoder import Decoder
from services.worker.engines.torch.models.names import (
    GGUF_ATTENTION,
    GGUF_EXPERTS,
    GGUF_MLP,
    GgufNaming,
    Naming,
)
from services.worker.engines.torch.models.qwen3 import GGUF_HEAD_NORMS, Attention

if TYPE_CHECKING:
    import torch

    from headrace.models.files import Format
    from services.worker.engines.torch.attention import Attend
    from services.worker.engines.torch.layers import Builder, Experts, GatedMLP, Rotation
    from services.worker.model_config import ModelConfig


class Block:
    """One layer: attention and experts or MLP, each behind a norm and around a residual."""

    def __init__(self, args: ModelConfig, build: Builder, layer: int) -> None:
        assert args.experts is not None
        name = f"model.layers.{layer}"
        eps = args.rms_norm_eps
        self.attention_norm = build.norm(f"{name}.input_layernorm", args.hidden_size, eps)
        self.attention = Attention(args, build, layer)
        self.mlp_norm = build.norm(f"{name}.post_attention_layernorm", args.hidden_size, eps)
        self.mlp: GatedMLP | Experts
        if layer in args.experts.dense_layers:
            self.mlp = build.mlp(f"{name}.mlp", args.hidden_size, args.intermediate_size)
        else:
            self.mlp = build.experts(f"{name}.mlp", args.hidden_size, args.experts)

    def __call__(self, x: torch.Tensor, rotate: Rotation, attend: Attend) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotate, attend)
        return x + self.mlp(self.mlp_norm(x))


class Qwen3Moe(Decoder):
    """The model."""

    def __init__(self, args: ModelConfig, build: Builder) -> None:
        super().__init__(args, build, Block)

    @staticmethod
    def naming(file_format: Format, args: ModelConfig) -> Naming:
        """How a file of this format names and arranges the weights."""
        if file_format == "gguf":
            return GgufNaming(GGUF_ATTENTION | GGUF_HEAD_NORMS | GGUF_MLP | GGUF_EXPERTS)
        return Naming(tied=args.tie_embeddings)
