"""A model's shape from an open GGUF file.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What no key
states is as llama.cpp has it in its code (src/llama-model.cpp). Rope factors,
which GGUF keeps as tensors, are read here: they are shape, not weights.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from math import log
from typing import TYPE_CHECKING, Any

from services.worker.model_config.config import (
    ExpertConfig,
    LayerAttention,
    ModelConfig,
    RopeConfig,
)
from services.worker.model_config.keys import Keys, checked

if TYPE_CHECKING:
    from headrace.models.gguf_file import GgufFile

#: general.architecture -> ours. Mistral's and Mixtral's files say llama.
_NAMES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "qwen3moe": "qwen3_moe",
}
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ROPE_TYPES = ("none", "linear", "yarn", "longrope")
# Gemma 3, by llama.cpp's code.
_GEMMA_PATTERN, _GEMMA_LOCAL_THETA, _GEMMA_27B_LAYERS = 6, 10_000.0, 62


def from_gguf(gguf: GgufFile) -> ModelConfig:
    """The shape of an open GGUF file."""
    keys = Keys(gguf.metadata, gguf.path)
    name = keys.get("general.architecture", str)
    if name not in _NAMES:
        keys.fail(f"architecture {name!r} is unknown; there are {', '.join(_NAMES)}")
    # All further keys but the tokenizer's begin with the architecture's name.
    own = Keys(
        {k.removeprefix(f"{name}."): v for k, v in gguf.metadata.items()
         if k.startswith(f"{name}.")}, gguf.path, f"{name}.",
    )  # fmt: skip
    experts = _experts(own)
    architecture = "mixtral" if name == "llama" and experts else _NAMES[name]
    hidden_size = own.get("embedding_length", int)
    num_heads = own.get("attention.head_count", int)
    head_dim = own.get("attention.key_length", int, hidden_size // max(1, num_heads))
    if own.get("attention.value_length", int, head_dim) != head_dim:
        keys.fail(f"{name}.attention.value_length is not key_length {head_dim}")
    rope = _rope(gguf, own, head_dim)
    if rope.rotary_dim != head_dim and architecture != "phi3":
        keys.fail(f"{name}.rope.dimension_count {rope.rotary_dim} of {head_dim} is not supported")
    eos = [gguf.metadata[key] for key in map("tokenizer.ggml.{}".format, _EOS_KEYS)
           if key in gguf.metadata]  # fmt: skip
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_vocab_size(gguf, own),
        context_len=own.positive("context_length", int),
        num_layers=own.get("block_count", int),
        hidden_size=hidden_size,
        intermediate_size=own.get("feed_forward_length", int),
        num_heads=num_heads,
        num_kv_heads=own.get("attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        rms_norm_eps=own.get("attention.layer_norm_rms_epsilon", float),
        rope=rope,
        local_rope=_local_rope(own, rope) if architecture == "gemma3" else None,
        tie_embeddings="output.weight" not in gguf.tensors,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        bos_token_id=keys.optional("tokenizer.ggml.bos_token_id", int),
        attention=(),
        experts=experts,
        final_soft_cap=own.optional("final_logit_softcapping", float),
    )
    return checked(replace(config, attention=_attention(own, config)), keys)


def _attention(own: Keys, config: ModelConfig) -> tuple[LayerAttention, ...]:
    window = own.optional("attention.sliding_window", int) or None
    if config.architecture != "gemma3":
        return (LayerAttention(window),) * config.num_layers
    # The largest model divides by the root of hidden_size / heads, the others of head_dim.
    largest = config.num_layers == _GEMMA_27B_LAYERS
    size = config.hidden_size / config.num_heads if largest else config.head_dim
    full = LayerAttention(
        None,
        own.get("attention.scale", float, size**-0.5),
        own.optional("attn_logit_softcapping", float),
    )
    pattern = own.values.get("attention.sliding_window_pattern", _GEMMA_PATTERN)
    if isinstance(pattern, list):
        slides = [bool(value) for value in pattern]
        if len(slides) != config.num_layers:
            own.fail(f"sliding_window_pattern has {len(slides)} entries for "
                     f"{config.num_layers} layers")  # fmt: skip
    else:
        slides = [(layer + 1) % pattern != 0 for layer in range(config.num_layers)]
    return tuple(replace(full, window=window) if slide else full for slide in slides)


def _rope(gguf: GgufFile, own: Keys, head_dim: int) -> RopeConfig:
    stated = own.get("rope.scaling.type", str, "none")
    own.one_of("rope.scaling.type", stated, _ROPE_TYPES, "rope type")
    rope = RopeConfig(
        own.positive("rope.freq_base", float, 10_000.0),
        own.get("rope.dimension_count", int, head_dim),
    )
    context_len = own.positive("context_length", int)
    # 0 is written for an attention factor that is not stated.
    scaled = replace(
        rope,
        factor=own.positive("rope.scaling.factor", float, 1.0),
        original_context_len=own.positive("rope.scaling.original_context_length", int, context_len),
        attention_factor=own.optional("rope.scaling.attn_factor", float) or None,
    )
    long = _floats(gguf, "rope_factors_long.weight")
    if long:
        short = _floats(gguf, "rope_factors_short.weight")
        factor = context_len / scaled.original_context_len
        return replace(
            scaled, kind="longrope", factor=factor, short_factors=short, long_factors=long
        )
    if divisors := _floats(gguf, "rope_freqs.weight"):
        return replace(rope, kind="factors", long_factors=divisors)
    if stated == "longrope":
        own.fail("rope.scaling.type is longrope, but there is no rope_factors_long.weight")
    if stated == "none":
        return rope
    if stated == "yarn":
        return replace(
            scaled,
            kind="yarn",
            # It multiplies yarn's own; config.json's replaces that.
            attention_factor=(scaled.attention_factor or 1.0) * (1 + 0.1 * log(scaled.factor)),
            beta_fast=own.positive("rope.scaling.yarn_beta_fast", float, 32.0),
            beta_slow=own.positive("rope.scaling.yarn_beta_slow", float, 1.0),
        )
    return replace(rope, kind="linear", factor=scaled.factor)


def _local_rope(own: Keys, rope: RopeConfig) -> RopeConfig:
    theta = own.positive("rope.freq_base_swa", float, _GEMMA_LOCAL_THETA)
    return RopeConfig(theta, rope.rotary_dim)


def _experts(own: Keys) -> ExpertConfig | None:
    count = own.get("expert_count", int, 0)
    if count == 0:
        return None
    return ExpertConfig(
        count,
        own.get("expert_used_count", int),
        own.get("expert_feed_forward_length", int, own.get("feed_forward_length", int)),
        normalize=own.get("expert_weights_norm", bool, default=True),
    )


def _floats(gguf: GgufFile, name: str) -> tuple[float, ...]:
    """A small F32 tensor's values; none if it is not there."""
    entry: Any = gguf.tensors.get(name)
    if entry is None:
        return ()
    if entry.type_name != "F32" or len(entry.shape) != 1:
        Keys({}, gguf.path).fail(f"{name} is {entry.type_name} of shape {list(entry.shape)}, "
                                 "and not a row of F32")  # fmt: skip
    return struct.unpack(f"<{entry.shape[0]}f", gguf.raw(name))


def _vocab_size(gguf: GgufFile, own: Keys) -> int:
    embedding = gguf.tensors.get("token_embd.weight")
    known = len(gguf.metadata.get("tokenizer.ggml.tokens", ())) or None
    rows = embedding.shape[0] if embedding else known
    size: int = own.get("vocab_size", int, rows)
    if rows is not None and size != rows:
        own.fail(f"vocab_size is {size}, but the embedding has {rows} rows")
    return size
