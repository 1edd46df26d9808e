"""Mixtral: Mistral with experts for feed-forward (https://arxiv.org/abs/2401.04088).

GGUF files of Mixtral say that they are Llama, with experts. Shapes: see decoder.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.engines.torch.models.decoder import Decoder
from services.worker.engines.torch.models.llama import Attention
from services.worker.engines.torch.models.names import (
    GGUF_ATTENTION,
    GGUF_EXPERTS,
    GgufNaming,
    Naming,
)

if TYPE_CHECKING:
    import torch

    from headrace.models.files import Format
    from services.worker.engines.torch.attention import Attend
    from services.worker.engines.torch.layers import Builder, Rotation
    from services.worker.model_config import ModelConfig

_GGUF_BLOCK_NAMES = GGUF_ATTENTION | GGUF_EXPERTS | {"ffn_norm": "post_attention_layernorm"}
#: Hugging Face's names of an expert's weights, and ours.
_EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Block:
    """One layer: attention and experts, each behind a norm and around a residual."""

    def __init__(self, args: ModelConfig, build: Builder, layer: int) -> None:
        assert args.experts is not None
        name = f"model.layers.{layer}"
        eps = args.rms_norm_eps
        self.attention_norm = build.norm(f"{name}.input_layernorm", args.hidden_size, eps)
        self.attention = Attention(args, build, layer)
        self.experts_norm = build.norm(f"{name}.post_attention_layernorm", args.hidden_size, eps)
        self.experts = build.experts(f"{name}.mlp", args.hidden_size, args.experts)

    def __call__(self, x: torch.Tensor, rotate: Rotation, attend: Attend) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotate, attend)
        return x + self.experts(self.experts_norm(x))


class Mixtral(Decoder):
    """The model."""

    def __init__(self, args: ModelConfig, build: Builder) -> None:
        super().__init__(args, build, Block)

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
