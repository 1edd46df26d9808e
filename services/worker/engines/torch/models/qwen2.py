"""Qwen 2 and 2.5: Llama with a bias on queries, keys and values (https://arxiv.org/abs/2407.10671).

Later layers may attend over a window, by the config. Shapes: see decoder.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.engines.torch.models.decoder import Block, Decoder
from services.worker.engines.torch.models.names import (
    GGUF_ATTENTION,
    GGUF_MLP,
    GgufNaming,
    Naming,
)

if TYPE_CHECKING:
    import torch

    from headrace.models.files import Format
    from services.worker.engines.torch.attention import Attend
    from services.worker.engines.torch.layers import Builder, Rotation
    from services.worker.model_config import ModelConfig


class Attention:
    """Queries, keys and values from one product with a bias; the output without."""

    def __init__(self, args: ModelConfig, build: Builder, layer: int) -> None:
        name = f"model.layers.{layer}.self_attn"
        self.layer = layer
        self.num_heads = args.num_heads
        self.num_rotated = args.num_heads + args.num_kv_heads
        self.head_dim = args.head_dim
        query_size = args.num_heads * args.head_dim
        kv_size = args.num_kv_heads * args.head_dim
        self.qkv = build.linear(
            args.hidden_size,
            {f"{name}.q_proj": query_size, f"{name}.k_proj": kv_size, f"{name}.v_proj": kv_size},
            bias=True,
        )
        self.output = build.linear(query_size, {f"{name}.o_proj": args.hidden_size})

    def __call__(self, x: torch.Tensor, rotate: Rotation, attend: Attend) -> torch.Tensor:
        heads = self.qkv(x).view(len(x), -1, self.head_dim)  # [T, H + 2K, D]
        rotate(heads[:, : self.num_rotated])
        queries, key_values = heads[:, : self.num_heads], heads[:, self.num_heads :]
        mixed = attend(self.layer, queries, key_values)  # [T, H, D]
        return self.output(mixed.view(len(x), -1))  # [T, E]


def _block(args: ModelConfig, build: Builder, layer: int) -> Block:
    return Block(args, build, layer, Attention(args, build, layer))


class Qwen2(Decoder):
    """The model."""

    def __init__(self, args: ModelConfig, build: Builder) -> None:
        super().__init__(args, build, _block)

    @staticmethod
    def naming(file_format: Format, args: ModelConfig) -> Naming:
        """How a file of this format names and arranges the weights."""
        if file_format == "gguf":
            return GgufNaming(GGUF_ATTENTION | GGUF_MLP)
        return Naming(tied=args.tie_embeddings)
