"""Noise without state: a hash of (seed, position, token id).

So a token's noise is the same alone or in any batch, before or after a resume,
over the whole vocabulary or over a few candidates. Hashes: splitmix64's finaliser
for a row's key (https://prng.di.unimi.it/splitmix64.c), murmur3's twice for each
token (https://github.com/aappleby/smhasher). torch's integers are signed and
wrap around; shifts are made logical by masks.
"""

from __future__ import annotations

import torch

_GOLDEN_64 = 0x9E3779B97F4A7C15
_GOLDEN_32 = 0x9E3779B9


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A 64-bit key for each row. Shapes: [rows], [rows] -> [rows], all int64.

    Seeds are unsigned 64-bit numbers in two's complement.
    """
    return _splitmix64(_splitmix64(seeds) + positions * _signed(_GOLDEN_64, 64))


def exponential(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Independent draws of the exponential distribution, float32.

    Shapes: keys [rows], token_ids [rows or 1, n] int32 -> [rows, n].
    """
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)
    state = token_ids * _signed(_GOLDEN_32, 32) + low[:, None]
    _murmur3(state)
    state ^= high[:, None]
    _murmur3(state)
    # u in (0, 1), with all 32 bits at its small end, which decides who wins a race.
    uniform = (state.long() & 0xFFFFFFFF).float().add_(0.5).mul_(2.0**-32)
    return uniform.neg_().log1p_().neg_()


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    x = x + _signed(_GOLDEN_64, 64)
    x = (x ^ _shift(x, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift(x, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift(x, 31, 64)


def _murmur3(x: torch.Tensor) -> None:
    x ^= _shift(x, 16, 32)
    x *= _signed(0x85EBCA6B, 32)
    x ^= _shift(x, 13, 32)
    x *= _signed(0xC2B2AE35, 32)
    x ^= _shift(x, 16, 32)


def _shift(x: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    return (x >> count).bitwise_and_((1 << (bits - count)) - 1)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value
