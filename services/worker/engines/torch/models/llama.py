"""Llama: RMS norm, rotary grouped-query attention, SwiGLU (https://arxiv.org/abs/2307.09288).

Shapes: T tokens of the step, E hidden size, H query heads, K key and value heads,
D head size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch.nn.functional as F

from services.worker.engines.torch.layers import Rope

if TYPE_CHECKING:
    import torch

    from headrace.models.files import Format
    from services.worker.engines.torch.attention import Attend
    from services.worker.engines.torch.layers import Builder
    from services.worker.model_config import ModelConfig as LlamaArgs

#: GGUF's names, without `.weight`, and ours.
_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_GGUF_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Attention:
    """Queries, keys and values from one product; the output projection."""

    def __init__(self, args: LlamaArgs, build: Builder, name: str) -> None:
        self.num_heads = args.num_heads
        self.num_rotated = args.num_heads + args.num_kv_heads
        self.head_dim = args.head_dim
        query_size = args.num_heads * args.head_dim
        kv_size = args.num_kv_heads * args.head_dim
        self.qkv = build.linear(
            args.hidden_size,
            {f"{name}.q_proj": query_size, f"{name}.k_proj": kv_size, f"{name}.v_proj": kv_size},
        )
        self.output = build.linear(query_size, {f"{name}.o_proj": args.hidden_size})

    def __call__(
        self,
        x: torch.Tensor,
        layer: int,
        rope: Rope,
        at: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        heads = self.qkv(x).view(len(x), -1, self.head_dim)  # [T, H + 2K, D]
        rotated = heads[:, : self.num_rotated]  # [T, H + K, D]
        rotated.copy_(rope.rotate(rotated, at))
        mixed = attend(layer, heads[:, : self.num_heads], heads[:, self.num_heads :])  # [T, H, D]
        return self.output(mixed.view(len(x), -1))  # [T, E]


class MLP:
    """SwiGLU, gate and up from one product."""

    def __init__(self, args: LlamaArgs, build: Builder, name: str) -> None:
        size = args.intermediate_size
        self.size = size
        self.gate_up = build.linear(
            args.hidden_size, {f"{name}.gate_proj": size, f"{name}.up_proj": size}
        )
        self.down = build.linear(size, {f"{name}.down_proj": args.hidden_size})

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)  # [T, 2F]
        return self.down(F.silu(both[:, : self.size]).mul_(both[:, self.size :]))  # [T, E]


class Block:
    """One layer: attention and MLP, each behind a norm and around a residual."""

    def __init__(self, args: LlamaArgs, build: Builder, layer: int) -> None:
        name = f"model.layers.{layer}"
        self.layer = layer
        eps = args.rms_norm_eps
        self.attention_norm = build.norm(f"{name}.input_layernorm", args.hidden_size, eps)
        self.attention = Attention(args, build, f"{name}.self_attn")
        self.mlp_norm = build.norm(f"{name}.post_attention_layernorm", args.hidden_size, eps)
        self.mlp = MLP(args, build, f"{name}.mlp")

    def __call__(
        self,
        x: torch.Tensor,
        rope: Rope,
        at: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), self.layer, rope, at, attend)
        return x + self.mlp(self.mlp_norm(x))


class Llama:
    """The model. Weights have Hugging Face's names, less `.weight`."""

    def __init__(self, args: LlamaArgs, build: Builder) -> None:
        self.embedding = build.embedding("model.embed_tokens", args.vocab_size, args.hidden_size)
        self.blocks = [Block(args, build, layer) for layer in range(args.num_layers)]
        self.norm = build.norm("model.norm", args.hidden_size, args.rms_norm_eps)
        if args.tie_embeddings:
            self.head = build.tied_linear(self.embedding)
        else:
            self.head = build.linear(args.hidden_size, {"lm_head": args.vocab_size})
        placement = build.placement
        self.rope = Rope(
            args.head_dim,
            args.rope_theta,
            args.context_len,
            placement.compute_dtype,
            placement.device,
        )

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Compute tokens that stand at `positions`. Shapes: [T], [T] -> [T, E]."""
        at = self.rope.at(positions)
        x = self.embedding(token_ids)
        for block in self.blocks:
            x = block(x, self.rope, at, attend)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Shapes: [rows, E] -> [rows, V]."""
        return self.head(hidden)

    @staticmethod
    def naming(file_format: Format, args: LlamaArgs) -> Naming:
        """How a file of this format names and arranges the weights."""
        return GgufNaming(args) if file_format == "gguf" else Naming(args)


class Naming:
    """Hugging Face's names: ours, with an ending."""

    def __init__(self, args: LlamaArgs) -> None:
        self._args = args

    def rename(self, name: str) -> str | None:
        """Our name of a checkpoint's tensor; None for one that the model does without."""
        if name.endswith("rotary_emb.inv_freq"):
            return None
        if name == "lm_head.weight" and self._args.tie_embeddings:
            return None
        return name.removesuffix(".weight")

    def restore(self, name: str, weight: torch.Tensor) -> None:
        """Rearrange, in place, a weight of which we have the name, into our order."""


class GgufNaming(Naming):
    """GGUF's names, and its order of rotary pairs."""

    def rename(self, name: str) -> str | None:
        """An unknown name stays itself, so that an error about it can be read."""
        stem = name.removesuffix(".weight")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match and match[2] in _GGUF_BLOCK_NAMES:
            return f"model.layers.{match[1]}.{_GGUF_BLOCK_NAMES[match[2]]}"
        return _GGUF_NAMES.get(stem, name)

    def restore(self, name: str, weight: torch.Tensor) -> None:
        """Undo llama.cpp's permutation: it keeps elements i and i + D/2 of a head side by side."""
        if not name.endswith(("q_proj", "k_proj")):
            return
        pairs = weight.view(-1, self._args.head_dim // 2, 2, weight.shape[1])
        weight.copy_(pairs.transpose(1, 2).reshape(weight.shape))
