"""Gemma 3, its text model (https://arxiv.org/abs/2503.19786).

Against Llama: most layers attend over a window and have a rope of their own; heads
of queries and keys are normalised; attention and MLP stand between two norms;
norms multiply by 1 + w; embeddings are scaled by the root of E; GELU. Images'
weights in a checkpoint are left where they are. Shapes: see decoder.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.layers.feed_forward import gelu_tanh
from services.worker.engines.torch.models.names import GGUF_ATTENTION, GgufNaming, Naming

if TYPE_CHECKING:
    from headrace.models.files import Format
    from services.worker.engines.torch.attention import Attend
    from services.worker.engines.torch.layers import Builder, RMSNorm, Rotation
    from services.worker.model_config import ModelConfig

_GGUF_BLOCK_NAMES = GGUF_ATTENTION | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Where checkpoints of the whole model, with images, keep the text model.
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
_IMAGE_PARTS = ("vision_tower.", "multi_modal_projector.")


class Attention:
    """Queries, keys and values from one product; queries and keys normalised and rotated."""

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
        )
        self.norm = build.head_norm(
            {f"{name}.q_norm": args.num_heads, f"{name}.k_norm": args.num_kv_heads},
            args.head_dim,
            args.rms_norm_eps,
            torch.float32,
        )
        self.output = build.linear(query_size, {f"{name}.o_proj": args.hidden_size})

    def __call__(self, x: torch.Tensor, rotate: Rotation, attend: Attend) -> torch.Tensor:
        heads = self.qkv(x).view(len(x), -1, self.head_dim)  # [T, H + 2K, D]
        rotated = heads[:, : self.num_rotated]
        self.norm(rotated)
        rotate(rotated)
        queries, key_values = heads[:, : self.num_heads], heads[:, self.num_heads :]
        mixed = attend(self.layer, queries, key_values)  # [T, H, D]
        return self.output(mixed.view(len(x), -1))  # [T, E]


class Block:
    """One layer: attention and MLP, each between two norms and around a residual."""

    def __init__(self, args: ModelConfig, build: Builder, layer: int) -> None:
        name = f"model.layers.{layer}"

        def norm(which: str) -> RMSNorm:
            # 1 + w in bfloat16 would lose most of w.
            return build.norm(f"{name}.{which}", args.hidden_size, args.rms_norm_eps, torch.float32)

        self.is_local = args.attention[layer].window is not None
        self.before_attention = norm("input_layernorm")
        self.attention = Attention(args, build, layer)
        self.after_attention = norm("post_attention_layernorm")
        self.before_mlp = norm("pre_feedforward_layernorm")
        self.mlp = build.mlp(f"{name}.mlp", args.hidden_size, args.intermediate_size, gelu_tanh)
        self.after_mlp = norm("post_feedforward_layernorm")

    def __call__(self, x: torch.Tensor, rotate: Rotation, attend: Attend) -> torch.Tensor:
        x = x + self.after_attention(self.attention(self.before_attention(x), rotate, attend))
        return x + self.after_mlp(self.mlp(self.before_mlp(x)))


class Gemma3:
    """The model. Weights have Hugging Face's names, less `.weight`."""

    def __init__(self, args: ModelConfig, build: Builder) -> None:
        self.embedding = build.embedding("model.embed_tokens", args.vocab_size, args.hidden_size)
        # Rounded as the embeddings are, which is how the model was trained.
        self.scale = torch.tensor(args.hidden_size**0.5, dtype=self.embedding.weight.dtype).item()
        self.blocks = [Block(args, build, layer) for layer in range(args.num_layers)]
        self.norm = build.norm("model.norm", args.hidden_size, args.rms_norm_eps, torch.float32)
        if args.tie_embeddings:
            self.head = build.tied_linear(self.embedding)
        else:
            self.head = build.linear(args.hidden_size, {"lm_head": args.vocab_size})
        self.rope = build.rope(args.rope, args.context_len)
        self.local_rope = build.rope(args.local_rope or args.rope, args.context_len)
        self.soft_cap = args.final_soft_cap

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Compute tokens that stand at `positions`. Shapes: [T], [T] -> [T, E]."""
        rotate, rotate_local = self.rope.at(positions), self.local_rope.at(positions)
        x = self.embedding(token_ids) * self.scale
        for block in self.blocks:
            x = block(x, rotate_local if block.is_local else rotate, attend)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Shapes: [rows, E] -> [rows, V]."""
        found = self.head(hidden)
        return found if self.soft_cap is None else (found / self.soft_cap).tanh() * self.soft_cap

    @staticmethod
    def naming(file_format: Format, args: ModelConfig) -> Naming:
        """How a file of this format names and arranges the weights."""
        if file_format == "gguf":
            # llama.cpp has added the 1 of 1 + w to its norms.
            return GgufNaming(_GGUF_BLOCK_NAMES)
        return _HuggingFaceNaming(tied=args.tie_embeddings)


class _HuggingFaceNaming(Naming):
    """The text model's names in checkpoints with and without images; 1 + w."""

    def rename(self, name: str) -> str | None:
        """See Naming.rename."""
        if name.removeprefix("model.").startswith(_IMAGE_PARTS):
            return None
        for prefix in _TEXT_PREFIXES:
            if name.startswith(prefix):
                name = "model." + name.removeprefix(prefix)
        return super().rename(name.removeprefix("language_model."))

    def restore(self, name: str, weight: torch.Tensor) -> None:
        """See Naming.restore."""
        if name.endswith("norm"):
            weight.add_(1)
