"""Keys of a config, read with errors that name file and key; and what no config may say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from headrace.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from services.worker.model_config.config import ModelConfig, RopeConfig

_POSITIVE = (
    "vocab_size", "context_len", "num_layers", "hidden_size", "intermediate_size",
    "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps",
)  # fmt: skip


class Keys:
    """The keys of one config file, or of an object in it, whose name is `prefix`."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self._prefix = prefix

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of `kind`; `default` for one that is absent or null.

        Raises StartupError for another kind, and for none where there is no default.
        """
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.fail(f"{self._prefix}{key} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fail(f"{self._prefix}{key} must be {kind.__name__}, not {value!r}")
        return value

    def optional(self, key: str, kind: type) -> Any:
        """A value of `kind`, or None."""
        return None if self.values.get(key) is None else self.get(key, kind)

    def positive(self, key: str, kind: type, default: Any = None) -> Any:
        """A number above 0."""
        value = self.get(key, kind, default)
        # Not `<= 0`: that would let NaN pass.
        if not 0 < value < float("inf"):
            self.fail(f"{self._prefix}{key} must be positive, not {value}")
        return value

    def inner(self, key: str) -> Keys:
        """The keys of an object, empty if it is absent."""
        return Keys(self.get(key, dict, {}), self.path, f"{self._prefix}{key}.")

    def one_of(self, key: str, found: Any, known: Sequence[str], what: str) -> None:
        """Fail if `found` is not known."""
        if found not in known:
            self.fail(f"{self._prefix}{key}: {what} {found!r} is not supported; "
                      f"there are {', '.join(known)}")  # fmt: skip

    def fail(self, reason: str) -> NoReturn:
        """Raise StartupError naming the file."""
        raise StartupError(f"model config {self.path}: {reason}")


def checked(config: ModelConfig, keys: Keys) -> ModelConfig:
    """`config`, if nothing in it contradicts itself."""
    for name in _POSITIVE:
        if getattr(config, name) <= 0:
            keys.fail(f"{name} must be positive, not {getattr(config, name)}")
    if config.num_heads % config.num_kv_heads:
        keys.fail(
            f"{config.num_heads} heads can't share {config.num_kv_heads} key and value heads evenly"
        )
    _check_rope(config.rope, config, keys)
    if config.local_rope is not None:
        _check_rope(config.local_rope, config, keys)
    _check_experts(config, keys)
    for token in config.eos_token_ids:
        if not isinstance(token, int) or not 0 <= token < config.vocab_size:
            keys.fail(f"end token {token!r} is not in the vocabulary of {config.vocab_size}")
    return config


def _check_rope(rope: RopeConfig, config: ModelConfig, keys: Keys) -> None:
    if rope.rotary_dim % 2 or not 0 < rope.rotary_dim <= config.head_dim:
        keys.fail(
            f"rope needs an even number of dimensions, at most head_dim {config.head_dim}, "
            f"not {rope.rotary_dim}"
        )
    for name in ("short_factors", "long_factors"):
        count = len(getattr(rope, name))
        if count not in (0, rope.rotary_dim // 2):
            keys.fail(f"rope has {count} {name} for {rope.rotary_dim // 2} frequencies")


def _check_experts(config: ModelConfig, keys: Keys) -> None:
    experts = config.experts
    if experts is None:
        return
    if experts.intermediate_size <= 0:
        keys.fail(f"the experts' intermediate_size must be positive, "
                  f"not {experts.intermediate_size}")  # fmt: skip
    if not 0 < experts.num_experts_per_token <= experts.num_experts:
        keys.fail(
            f"each token uses {experts.num_experts_per_token} of {experts.num_experts} experts"
        )
