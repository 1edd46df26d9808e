"""Phi 3 and 4: Llama with fused weights and rope over part of a head (https://arxiv.org/abs/2404.14219).

Attention may be over a window, by the config. Shapes: see decoder.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.engines.torch.layers import GatedMLP
from services.worker.engines.torch.models.decoder import Block, Decoder
from services.worker.engines.torch.models.names import GgufNaming, Naming

if TYPE_CHECKING:
    import torch

    from headrace.models.files import Format
    from services.worker.engines.torch.attention import Attend
    from services.worker.engines.torch.layers import Builder, Rotation
    from services.worker.model_config import ModelConfig

_GGUF_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    # Gates and ups, under the name that others give to ups alone.
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


class Attention:
    """Queries, keys and values from one product; the output projection."""

    def __init__(self, args: ModelConfig, build: Builder, layer: int) -> None:
        name = f"model.layers.{layer}.self_attn"
        self.layer = layer
        self.num_heads = args.num_heads
        self.num_rotated = args.num_heads + args.num_kv_heads
        self.head_dim = args.head_dim
        query_size = args.num_heads * args.head_dim
        qkv_size = query_size + 2 * args.num_kv_heads * args.head_dim
        self.qkv = build.linear(args.hidden_size, {f"{name}.qkv_proj": qkv_size})
        self.output = build.linear(query_size, {f"{name}.o_proj": args.hidden_size})

    def __call__(self, x: torch.Tensor, rotate: Rotation, attend: Attend) -> torch.Tensor:
        heads = self.qkv(x).view(len(x), -1, self.head_dim)  # [T, H + 2K, D]
        rotate(heads[:, : self.num_rotated])
        queries, key_values = heads[:, : self.num_heads], heads[:, self.num_heads :]
        mixed = attend(self.layer, queries, key_values)  # [T, H, D]
        return self.output(mixed.view(len(x), -1))  # [T, E]


def _block(args: ModelConfig, build: Builder, layer: int) -> Block:
    name, size = f"model.layers.{layer}.mlp", args.intermediate_size
    mlp = GatedMLP(
        build.linear(args.hidden_size, {f"{name}.gate_up_proj": 2 * size}),
        build.linear(size, {f"{name}.down_proj": args.hidden_size}),
        size,
    )
    return Block(args, build, layer, Attention(args, build, layer), mlp)


class Phi3(Decoder):
    """The model."""

    def __init__(self, args: ModelConfig, build: Builder) -> None:
        super().__init__(args, build, _block)

    @staticmethod
    def naming(file_format: Format, args: ModelConfig) -> Naming:
        """How a file of this format names and arranges the weights."""
        if file_format == "gguf":
            return GgufNaming(_GGUF_BLOCK_NAMES)
        return Naming(tied=args.tie_embeddings)
