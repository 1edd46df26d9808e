"""The frame of a decoder: embedding, blocks, norm, output projection; and the usual block.

What stands in a block is the architecture's. Shapes, here and in all
architectures: T tokens of the step, E hidden size, H query heads, K key and value
heads, D head size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from services.worker.engines.torch.attention import Attend
    from services.worker.engines.torch.layers import Builder, Rotation
    from services.worker.model_config import ModelConfig

    #: Attention, and a whole block: the hidden state in and out.
    Mix = Callable[[torch.Tensor, Rotation, Attend], torch.Tensor]
    FeedForward = Callable[[torch.Tensor], torch.Tensor]
    MakeBlock = Callable[[ModelConfig, Builder, int], Mix]


class Block:
    """One layer: attention and feed-forward (None: an MLP), each behind a norm and
    around a residual. Takes and returns the hidden state, [T, E]."""

    def __init__(
        self,
        args: ModelConfig,
        build: Builder,
        layer: int,
        attention: Mix,
        feed_forward: FeedForward | None = None,
    ) -> None:
        name = f"model.layers.{layer}"
        hidden, eps = args.hidden_size, args.rms_norm_eps
        self.attention_norm = build.norm(f"{name}.input_layernorm", hidden, eps)
        self.attention = attention
        self.feed_forward_norm = build.norm(f"{name}.post_attention_layernorm", hidden, eps)
        self.feed_forward = feed_forward or build.mlp(f"{name}.mlp", hidden, args.intermediate_size)

    def __call__(self, x: torch.Tensor, rotate: Rotation, attend: Attend) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotate, attend)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder:
    """A model of `args.num_layers` blocks, made by `make_block(args, build, layer)`.

    A block takes and returns the hidden state, [T, E]. Weights have Hugging Face's
    names, less `.weight`.
    """

    def __init__(self, args: ModelConfig, build: Builder, make_block: MakeBlock) -> None:
        self.embedding = build.embedding("model.embed_tokens", args.vocab_size, args.hidden_size)
        self.blocks = [make_block(args, build, layer) for layer in range(args.num_layers)]
        self.norm = build.norm("model.norm", args.hidden_size, args.rms_norm_eps)
        if args.tie_embeddings:
            self.head = build.tied_linear(self.embedding)
        else:
            self.head = build.linear(args.hidden_size, {"lm_head": args.vocab_size})
        self.rope = build.rope(args.rope, args.context_len)

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Compute tokens that stand at `positions`. Shapes: [T], [T] -> [T, E]."""
        rotate = self.rope.at(positions)
        x = self.embedding(token_ids)
        for block in self.blocks:
            x = block(x, rotate, attend)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Shapes: [rows, E] -> [rows, V]."""
        return self.head(hidden)
