"""A model's shape from a Hugging Face directory.

Keys and their defaults are those of the `configuration_*.py` of
https://github.com/huggingface/transformers: what a config.json leaves out means
what it means there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.errors import StartupError
from services.worker.model_config.config import ExpertConfig, LayerAttention, ModelConfig
from services.worker.model_config.huggingface_rope import read_rope
from services.worker.model_config.keys import Keys, checked

if TYPE_CHECKING:
    from pathlib import Path

#: model_type -> architecture.
_MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
}
ARCHITECTURES = tuple(dict.fromkeys(_MODEL_TYPES.values()))

#: Defaults that differ from _COMMON.
_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "gemma3": {
        "sliding_window": 4096, "head_dim": 256, "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True, "rope_theta": 1_000_000.0, "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "mixtral": {
        "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "sliding_window": 4096, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
}  # fmt: skip
_FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def from_huggingface(directory: Path) -> ModelConfig:
    """The shape of a directory: config.json, and generation_config.json for ends."""
    outer = Keys(_read_json(directory / "config.json"), directory / "config.json")
    model_type = outer.get("model_type", str)
    if model_type not in _MODEL_TYPES:
        outer.fail(f"architecture {model_type!r} is unknown; there are {', '.join(_MODEL_TYPES)}")
    architecture = _MODEL_TYPES[model_type]
    stated = outer.get("text_config", dict) if model_type == "gemma3" else outer.values
    keys = Keys(_COMMON | _DEFAULTS.get(architecture, {}) | dict(stated), outer.path)
    _refuse(keys, outer, architecture)

    hidden_size = keys.get("hidden_size", int)
    num_heads = keys.get("num_attention_heads", int)
    head_dim = keys.get("head_dim", int, hidden_size // max(1, num_heads))
    context_len = keys.positive("max_position_embeddings", int)
    rope, local_rope, context_len = read_rope(keys, architecture, head_dim, context_len)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=keys.get("vocab_size", int),
        context_len=context_len,
        num_layers=keys.get("num_hidden_layers", int),
        hidden_size=hidden_size,
        intermediate_size=keys.get("intermediate_size", int),
        num_heads=num_heads,
        num_kv_heads=keys.get("num_key_value_heads", int, num_heads),
        head_dim=head_dim,
        rms_norm_eps=keys.get("rms_norm_eps", float),
        rope=rope,
        local_rope=local_rope,
        tie_embeddings=keys.get("tie_word_embeddings", bool, default=False),
        eos_token_ids=_ends(directory, outer, keys),
        bos_token_id=keys.optional("bos_token_id", int),
        attention=(),
        experts=_experts(keys, architecture),
        final_soft_cap=_cap(keys, "final_logit_softcapping") if architecture == "gemma3" else None,
    )
    return checked(replace(config, attention=_attention(keys, config)), keys)


def _refuse(keys: Keys, outer: Keys, architecture: str) -> None:
    """Fail for what a config may ask for and no architecture here does."""
    for place in (outer, keys):
        if place.values.get("quantization_config"):
            method = place.inner("quantization_config").values.get("quant_method")
            keys.fail(f"quantization_config: checkpoints quantized by {method!r} are not supported")
    for key in ("dtype", "torch_dtype"):
        if keys.values.get(key) is not None:
            name = keys.get(key, str).removeprefix("torch.")
            keys.one_of(key, name, _FLOAT_DTYPES, "the type")
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if keys.get(key, bool, default=False):
            keys.fail(f"{key} is not supported for {architecture}")
    key, known = ("hidden_activation", "gelu_pytorch_tanh") if architecture == "gemma3" else (
        "hidden_act", "silu")  # fmt: skip
    if (activation := keys.get(key, str, known)) != known:
        keys.fail(f"{key} {activation!r} is not supported for {architecture} ({known} is)")


def _attention(keys: Keys, config: ModelConfig) -> tuple[LayerAttention, ...]:
    """How each layer attends."""
    full = LayerAttention()
    if config.architecture == "gemma3":
        scale = keys.positive("query_pre_attn_scalar", float) ** -0.5
        full = LayerAttention(None, scale, _cap(keys, "attn_logit_softcapping"))
    window = keys.optional("sliding_window", int)
    if config.architecture == "llama" or window is None:
        return (full,) * config.num_layers
    if config.architecture.startswith("qwen") and not keys.get(
        "use_sliding_window", bool, default=False
    ):
        return (full,) * config.num_layers
    if window < 1:
        keys.fail(f"sliding_window must be positive, not {window}")
    slides = _sliding_layers(keys, config)
    return tuple(replace(full, window=window) if slide else full for slide in slides)


def _sliding_layers(keys: Keys, config: ModelConfig) -> list[bool]:
    layers = range(config.num_layers)
    kinds = keys.optional("layer_types", list)
    if config.architecture in ("qwen2", "qwen3", "gemma3") and kinds is not None:
        if len(kinds) != config.num_layers:
            keys.fail(f"layer_types has {len(kinds)} entries for {config.num_layers} layers")
        for kind in kinds:
            keys.one_of("layer_types", kind, ("sliding_attention", "full_attention"), "the layer")
        return [kind == "sliding_attention" for kind in kinds]
    if config.architecture in ("qwen2", "qwen3"):
        return [layer >= keys.get("max_window_layers", int) for layer in layers]
    if config.architecture == "gemma3":
        pattern = keys.positive("sliding_window_pattern", int)
        return [(layer + 1) % pattern != 0 for layer in layers]
    return [True] * config.num_layers


def _cap(keys: Keys, key: str) -> float | None:
    found: float | None = keys.positive(key, float) if keys.values.get(key) is not None else None
    return found


def _experts(keys: Keys, architecture: str) -> ExpertConfig | None:
    if architecture == "mixtral":
        return ExpertConfig(
            keys.get("num_local_experts", int),
            keys.get("num_experts_per_tok", int),
            keys.get("intermediate_size", int),
            normalize=True,
        )
    if architecture != "qwen3_moe":
        return None
    # Newer files have Mixtral's name for the same key.
    count = keys.get("num_experts", int, keys.get("num_local_experts", int, 128))
    step = keys.positive("decoder_sparse_step", int)
    listed = keys.get("mlp_only_layers", list, [])
    dense = {
        layer
        for layer in range(keys.get("num_hidden_layers", int))
        if layer in listed or (layer + 1) % step
    }
    return ExpertConfig(
        count,
        keys.get("num_experts_per_tok", int),
        keys.get("moe_intermediate_size", int),
        normalize=keys.get("norm_topk_prob", bool, default=False),
        dense_layers=frozenset(dense),
    )


def _ends(directory: Path, outer: Keys, keys: Keys) -> tuple[int, ...]:
    """End tokens, generation_config.json's first: chat models name more of them there."""
    found = []
    path = directory / "generation_config.json"
    for values in (_read_json(path) if path.exists() else {}, outer.values, keys.values):
        ends = values.get("eos_token_id")
        found += ends if isinstance(ends, list) else [] if ends is None else [ends]
    return tuple(dict.fromkeys(found))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StartupError(f"can't read model config {path}: {error}") from error
    if not isinstance(content, dict):
        raise StartupError(f"model config {path} must be a JSON object")
    return content
