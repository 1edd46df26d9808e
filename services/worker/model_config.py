"""A model's shape, from GGUF keys or a Hugging Face config.json.

It reads numbers and refuses what they contradict; it opens no tensor, and knows
which architectures exist, not how they compute.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from headrace.errors import StartupError
from headrace.models.gguf_file import GgufFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from headrace.models.files import ModelFiles
    from services.worker.engine import EngineConfig

#: Architectures whose config is read here, under GGUF's and Hugging Face's names.
ARCHITECTURES = ("llama",)

_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer.

    Attention has `num_heads` query heads of `head_dim`, in groups that share one
    of `num_kv_heads` key and value heads.
    """

    architecture: str
    vocab_size: int
    #: Longest sequence that the model was trained for, in tokens.
    context_len: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    #: The output projection is the embedding.
    tie_embeddings: bool
    #: Tokens that end an answer; may be empty.
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that the KV cache keeps for a token, of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def read(files: ModelFiles) -> ModelConfig:
    """The shape of the model in `files`.

    Raises StartupError naming the file and the missing, contradicting or
    unsupported key.
    """
    if files.format == "gguf":
        return from_gguf(GgufFile(files.path))
    return from_huggingface(files.path)


def from_gguf(gguf: GgufFile) -> ModelConfig:
    """The shape of an open GGUF file (keys: ggml's docs/gguf.md)."""
    keys = _Keys(gguf.metadata, gguf.path)
    architecture = keys.architecture(keys.get("general.architecture", str))
    hidden_size = keys.get(f"{architecture}.embedding_length", int)
    num_heads = keys.get(f"{architecture}.attention.head_count", int)
    head_dim = keys.get(
        f"{architecture}.attention.key_length", int, default=hidden_size // max(1, num_heads)
    )
    rotated = keys.get(f"{architecture}.rope.dimension_count", int, default=head_dim)
    if rotated != head_dim:
        keys.fail(f"rope over {rotated} of {head_dim} dimensions of a head is not supported")
    if keys.get(f"{architecture}.rope.scaling.type", str, default="none") != "none":
        keys.fail(f"{architecture}.rope.scaling.type: scaled rope is not supported")
    if "rope_freqs.weight" in gguf.tensors:
        keys.fail("rope_freqs.weight: scaled rope is not supported")
    eos = [gguf.metadata[key] for key in map("tokenizer.ggml.{}".format, _EOS_KEYS)
           if key in gguf.metadata]  # fmt: skip
    return keys.checked(
        ModelConfig(
            architecture=architecture,
            vocab_size=_gguf_vocab_size(gguf, keys, architecture),
            context_len=keys.get(f"{architecture}.context_length", int),
            num_layers=keys.get(f"{architecture}.block_count", int),
            hidden_size=hidden_size,
            intermediate_size=keys.get(f"{architecture}.feed_forward_length", int),
            num_heads=num_heads,
            num_kv_heads=keys.get(f"{architecture}.attention.head_count_kv", int, num_heads),
            head_dim=head_dim,
            rms_norm_eps=keys.get(f"{architecture}.attention.layer_norm_rms_epsilon", float),
            rope_theta=keys.get(f"{architecture}.rope.freq_base", float, 10_000.0),
            tie_embeddings="output.weight" not in gguf.tensors,
            eos_token_ids=tuple(dict.fromkeys(eos)),
            bos_token_id=keys.optional("tokenizer.ggml.bos_token_id"),
        )
    )


def from_huggingface(directory: Path) -> ModelConfig:
    """The shape of a Hugging Face directory: config.json, and generation_config.json for ends."""
    keys = _Keys(_read_json(directory / "config.json"), directory / "config.json")
    architecture = keys.architecture(keys.get("model_type", str))
    for key in ("attention_bias", "mlp_bias"):
        if keys.get(key, bool, default=False):
            keys.fail(f"{key} is not supported for {architecture}")
    if (activation := keys.get("hidden_act", str, "silu")) != "silu":
        keys.fail(f"hidden_act {activation!r} is not supported for {architecture} (silu is)")
    hidden_size = keys.get("hidden_size", int)
    num_heads = keys.get("num_attention_heads", int)
    return keys.checked(
        ModelConfig(
            architecture=architecture,
            vocab_size=keys.get("vocab_size", int),
            context_len=keys.get("max_position_embeddings", int),
            num_layers=keys.get("num_hidden_layers", int),
            hidden_size=hidden_size,
            intermediate_size=keys.get("intermediate_size", int),
            num_heads=num_heads,
            num_kv_heads=keys.get("num_key_value_heads", int, num_heads),
            head_dim=keys.get("head_dim", int, hidden_size // max(1, num_heads)),
            rms_norm_eps=keys.get("rms_norm_eps", float, 1e-6),
            rope_theta=_rope_theta(keys),
            tie_embeddings=keys.get("tie_word_embeddings", bool, default=False),
            eos_token_ids=_huggingface_ends(directory, keys),
            bos_token_id=keys.optional("bos_token_id"),
        )
    )


def context_len(config: EngineConfig, model: ModelConfig, num_blocks: int) -> int:
    """The longest sequence that an engine takes: what is asked, and fits model and KV cache.

    Raises StartupError if `config.context_len` asks for more than the model has.
    """
    if not 0 <= config.context_len <= model.context_len:
        raise StartupError(
            f"context_len must be at most the model's {model.context_len}, not {config.context_len}"
        )
    return min(config.context_len or model.context_len, num_blocks * config.block_size)


def num_blocks(config: EngineConfig, bytes_per_token: int) -> int:
    """KV blocks to allocate: `config.num_blocks`, or what `config.kv_cache_mib` holds.

    Raises StartupError for sizes that hold no block.
    """
    if config.block_size < 1:
        raise StartupError(f"block_size must be 1 or more, not {config.block_size}")
    if config.num_blocks < 0:
        raise StartupError(f"num_blocks must be 0 or more, not {config.num_blocks}")
    found = config.num_blocks or (config.kv_cache_mib << 20) // (
        bytes_per_token * config.block_size
    )
    if found < 1:
        raise StartupError(
            f"kv_cache_mib {config.kv_cache_mib} holds no block of {config.block_size} tokens "
            f"({bytes_per_token} bytes each): raise it"
        )
    return found


class _Keys:
    """A config's keys, with errors that name file and key."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.fail(f"{key} is missing")
            return default
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fail(f"{key} must be {kind.__name__}, not {value!r}")
        return value

    def optional(self, key: str) -> int | None:
        return None if self.values.get(key) is None else int(self.get(key, int))

    def architecture(self, name: str) -> str:
        if name not in ARCHITECTURES:
            self.fail(f"architecture {name!r} is unknown; there are {', '.join(ARCHITECTURES)}")
        return name

    def checked(self, config: ModelConfig) -> ModelConfig:
        for name in (
            "vocab_size", "context_len", "num_layers", "hidden_size", "intermediate_size",
            "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps", "rope_theta",
        ):  # fmt: skip
            if getattr(config, name) <= 0:
                self.fail(f"{name} must be positive, not {getattr(config, name)}")
        if config.num_heads % config.num_kv_heads:
            self.fail(
                f"{config.num_heads} heads can't share {config.num_kv_heads} "
                "key and value heads evenly"
            )
        if config.head_dim % 2:
            self.fail(f"rope needs an even head_dim, not {config.head_dim}")
        for token in config.eos_token_ids:
            if not isinstance(token, int) or not 0 <= token < config.vocab_size:
                self.fail(f"end token {token!r} is not in the vocabulary of {config.vocab_size}")
        return config

    def fail(self, reason: str) -> NoReturn:
        raise StartupError(f"model config {self.path}: {reason}")


def _gguf_vocab_size(gguf: GgufFile, keys: _Keys, architecture: str) -> int:
    embedding = gguf.tensors.get("token_embd.weight")
    known = len(gguf.metadata.get("tokenizer.ggml.tokens", ())) or None
    rows = embedding.shape[0] if embedding else known
    size: int = keys.get(f"{architecture}.vocab_size", int, rows)
    if rows is not None and size != rows:
        keys.fail(f"{architecture}.vocab_size is {size}, but the embedding has {rows} rows")
    return size


def _rope_theta(keys: _Keys) -> float:
    # Older files have rope_theta and rope_scaling, newer ones rope_parameters.
    parameters = keys.get("rope_parameters", dict, {}) or keys.get("rope_scaling", dict, {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        keys.fail(f"rope type {kind!r} is not supported (default is)")
    theta = parameters.get("rope_theta")
    return float(theta if theta is not None else keys.get("rope_theta", float, 10_000.0))


def _huggingface_ends(directory: Path, keys: _Keys) -> tuple[int, ...]:
    """End tokens, generation_config.json's first: chat models name more of them there."""
    found = []
    path = directory / "generation_config.json"
    for values in (_read_json(path) if path.exists() else {}, keys.values):
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
