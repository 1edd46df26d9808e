"""Rotary position embedding in the half-rotation form (https://arxiv.org/abs/2104.09864).

Element i of a head is rotated together with element i + head_dim / 2.
"""

from __future__ import annotations

import torch


class Rope:
    """Cosines and sines of every position below `context_len`, looked up once a step."""

    def __init__(
        self,
        head_dim: int,
        theta: float,
        context_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(context_len, dtype=torch.float32), frequencies)
        self._half = head_dim // 2
        cosines, sines = angles.cos(), angles.sin()
        # The sign of the rotated half is in the table: [-sin, sin].
        self._cos = torch.cat((cosines, cosines), -1).to(device, dtype)  # [context, head_dim]
        self._sin = torch.cat((-sines, sines), -1).to(device, dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `rotate` takes for tokens at `positions`, [tokens]: two of [tokens, 1, head_dim]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def rotate(self, x: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotate heads `x`, [tokens, heads, head_dim]."""
        cosines, sines = at
        return (x * cosines).addcmul_(x.roll(self._half, -1), sines)
