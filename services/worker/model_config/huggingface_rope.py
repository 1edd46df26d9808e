"""Rotary embedding as config.json asks for it, in older and newer spelling.

Older files have `rope_theta` and `rope_scaling`, newer ones `rope_parameters`,
Gemma 3's one for each kind of layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.model_config.config import RopeConfig

if TYPE_CHECKING:
    from services.worker.model_config.keys import Keys

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_LOCAL_THETA = 10_000.0


def read_rope(
    keys: Keys, architecture: str, head_dim: int, context_len: int
) -> tuple[RopeConfig, RopeConfig | None, int]:
    """The rope, that of windowed layers if it differs, and the context that it makes possible."""
    name = "rope_scaling" if keys.values.get("rope_scaling") else "rope_parameters"
    stated = keys.inner(name)
    theta = keys.positive("rope_theta", float)
    if architecture != "gemma3":
        rope = _rope(keys, stated, theta, head_dim, context_len, architecture)
        return rope, None, _stretched(rope, stated, context_len)
    nested = "full_attention" in stated.values or "sliding_attention" in stated.values
    full = stated.inner("full_attention") if nested else stated
    rope = _rope(keys, full, theta, head_dim, context_len, architecture)
    local_theta = keys.positive("rope_local_base_freq", float, _LOCAL_THETA)
    # An unnested scaling is the full layers' alone.
    local = _rope(keys, stated.inner("sliding_attention"), local_theta, head_dim, context_len,
                  architecture)  # fmt: skip
    return rope, local, _stretched(rope, full, context_len)


def _rope(
    keys: Keys, stated: Keys, theta: float, head_dim: int, context_len: int, architecture: str
) -> RopeConfig:
    kind = stated.values.get("rope_type") or stated.values.get("type") or "default"
    if architecture == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    stated.one_of("rope_type", kind, ROPE_TYPES, "rope type")
    theta = stated.positive("rope_theta", float, theta)
    partial = stated.positive(
        "partial_rotary_factor", float, keys.positive("partial_rotary_factor", float, 1.0)
    )
    if partial != 1.0 and architecture != "phi3":
        keys.fail(f"partial_rotary_factor {partial} is not supported for {architecture}")
    plain = RopeConfig(theta, int(head_dim * partial))
    if kind == "default":
        return plain
    original = _original(keys, stated, kind, context_len)
    # Where only both lengths are stated, their ratio is the factor.
    ratio = context_len / original if kind in ("yarn", "longrope") else None
    return RopeConfig(
        plain.theta,
        plain.rotary_dim,
        kind=kind,
        factor=stated.positive("factor", float, ratio),
        original_context_len=original,
        attention_factor=stated.optional("attention_factor", float),
        low_freq_factor=_needed(stated, "low_freq_factor", kind == "llama3", 1.0),
        high_freq_factor=_needed(stated, "high_freq_factor", kind == "llama3", 4.0),
        beta_fast=stated.positive("beta_fast", float, 32.0),
        beta_slow=stated.positive("beta_slow", float, 1.0),
        mscale=stated.optional("mscale", float),
        mscale_all_dim=stated.optional("mscale_all_dim", float),
        truncate=stated.get("truncate", bool, default=True),
        short_factors=_factors(stated, "short_factor", kind),
        long_factors=_factors(stated, "long_factor", kind),
    )


def _original(keys: Keys, stated: Keys, kind: str, context_len: int) -> int:
    """The length before stretching: Phi 3 states it outside of the scaling."""
    inside = stated.positive("original_max_position_embeddings", int, context_len)
    if kind in ("llama3", "yarn", "longrope"):
        inside = keys.positive("original_max_position_embeddings", int, inside)
    return int(inside)


def _needed(stated: Keys, key: str, needed: bool, default: float) -> float:
    return float(stated.positive(key, float, None if needed else default))


def _factors(stated: Keys, key: str, kind: str) -> tuple[float, ...]:
    if kind != "longrope":
        return ()
    values = stated.get(key, list)
    if not values or not all(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        for value in values
    ):
        stated.fail(f"{key} must be positive numbers, not {values!r}")
    return tuple(float(value) for value in values)


def _stretched(rope: RopeConfig, stated: Keys, context_len: int) -> int:
    """The model's context: `max_position_embeddings` is the length before stretching for
    dynamic rope, and for yarn may be either.
    """
    if rope.kind == "dynamic":
        return int(context_len * rope.factor)
    if rope.kind == "yarn" and "original_max_position_embeddings" in stated.values:
        return max(context_len, int(rope.original_context_len * rope.factor))
    return context_len
