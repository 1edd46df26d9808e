"""How fast each pair of elements of a head turns, by the ways to stretch a context.

Each entry of FREQUENCIES gives radians per position, [rotary_dim / 2] float32,
and a factor for cosines and sines. It knows no positions and no heads.

`dynamic` and `longrope` depend on the length of the sequence. A KV cache holds
keys that were rotated once, so the length here is the longest that is served.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.model_config import RopeConfig


def frequencies(rope: RopeConfig, context_len: int) -> tuple[torch.Tensor, float]:
    """An entry of FREQUENCIES, for sequences of at most `context_len` tokens."""
    return FREQUENCIES[rope.kind](rope, context_len)


def _powers(theta: float, rotary_dim: int) -> torch.Tensor:
    """theta^(2i / rotary_dim): positions over which pair i turns by one radian."""
    return theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def _default(rope: RopeConfig, context_len: int) -> tuple[torch.Tensor, float]:
    """https://arxiv.org/abs/2104.09864."""
    return 1 / _powers(rope.theta, rope.rotary_dim), 1.0


def _linear(rope: RopeConfig, context_len: int) -> tuple[torch.Tensor, float]:
    """Positions divided by a factor (https://arxiv.org/abs/2306.15595)."""
    return 1 / _powers(rope.theta, rope.rotary_dim) / rope.factor, 1.0


def _factors(rope: RopeConfig, context_len: int) -> tuple[torch.Tensor, float]:
    """Each frequency divided by its own number, as GGUF writes llama3's result."""
    return 1 / (_powers(rope.theta, rope.rotary_dim) * torch.tensor(rope.long_factors)), 1.0


def _dynamic(rope: RopeConfig, context_len: int) -> tuple[torch.Tensor, float]:
    """The base grows with the sequence, beyond the original length ("NTK-aware").

    https://arxiv.org/abs/2309.00071, 3.3, with transformers' exponent.
    """
    original, dim = rope.original_context_len, rope.rotary_dim
    length = max(context_len, original)
    stretch = rope.factor * length / original - (rope.factor - 1)
    theta = rope.theta * stretch ** (dim / (dim - 2))
    return 1 / _powers(theta, dim), 1.0


def _llama3(rope: RopeConfig, context_len: int) -> tuple[torch.Tensor, float]:
    """Long waves are divided by the factor, short ones kept, those between blended.

    https://github.com/meta-llama/llama-models, models/llama3 (apply_scaling).
    """
    plain = 1 / _powers(rope.theta, rope.rotary_dim)
    turns = rope.original_context_len * plain / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * (1 - kept) + plain * kept, 1.0


def _yarn(rope: RopeConfig, context_len: int) -> tuple[torch.Tensor, float]:
    """Pairs that turn often are kept, slow ones divided, by a ramp between: YaRN.

    https://arxiv.org/abs/2309.00071, 3.2 to 3.4; `mscale` is DeepSeek's.
    """
    dim = rope.rotary_dim

    def pair_that_turns(times: float) -> float:
        ratio = rope.original_context_len / (times * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (max(high - low, 0.001))
    divided = ramp.clamp(0, 1)
    plain = 1 / _powers(rope.theta, dim)
    mixed = plain / rope.factor * divided + plain * (1 - divided)
    if rope.attention_factor is not None:
        return mixed, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        scale = _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
        return mixed, scale
    return mixed, _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rope: RopeConfig, context_len: int) -> tuple[torch.Tensor, float]:
    """Each frequency divided by a number found by search, one set for long sequences.

    https://arxiv.org/abs/2402.13753.
    """
    original = rope.original_context_len
    divisors = rope.long_factors if context_len > original else rope.short_factors
    plain = 1 / (_powers(rope.theta, rope.rotary_dim) * torch.tensor(divisors))
    if rope.attention_factor is not None:
        return plain, rope.attention_factor
    if rope.factor <= 1:
        return plain, 1.0
    return plain, math.sqrt(1 + math.log(rope.factor) / math.log(original))


FREQUENCIES: dict[str, Callable[[RopeConfig, int], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "factors": _factors,
}
