"""Rotary position embedding in the half-rotation form (https://arxiv.org/abs/2104.09864).

Element i of a head is rotated together with element i + rotary_dim / 2; elements
from rotary_dim on stay as they are. Frequencies: rope_frequencies.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.kernels import kernels
from services.worker.engines.torch.layers.rope_frequencies import frequencies

if TYPE_CHECKING:
    from services.worker.engines.torch.device import Placement
    from services.worker.engines.torch.kernels import Kernels
    from services.worker.model_config import RopeConfig


class Rope:
    """Makes rotations; `context_len` is the longest sequence served.

    No table of all positions is kept: at 131,072 of them and 256 elements it has
    134 MB, and a step needs a few rows.
    """

    def __init__(self, rope: RopeConfig, context_len: int, placement: Placement) -> None:
        found, self._factor = frequencies(rope, context_len)
        self._frequencies = found.to(placement.device)
        self._dtype = placement.compute_dtype
        takes = placement.device.type == "cpu" and placement.compute_dtype == torch.float32
        self._kernels = kernels() if takes and self._frequencies.numel() % 8 == 0 else None

    def at(self, positions: torch.Tensor) -> Rotation:
        """The rotation of tokens at `positions`, [tokens]. Once a step."""
        if self._kernels is not None:
            found = self._kernels.angles(positions, self._frequencies, self._factor)
            return CompiledRotation(self._kernels, *found)
        angles = positions.to(torch.float32)[:, None, None] * self._frequencies
        cosines, sines = angles.cos().mul_(self._factor), angles.sin().mul_(self._factor)
        return Rotation(
            torch.cat((cosines, cosines), -1).to(self._dtype),
            torch.cat((-sines, sines), -1).to(self._dtype),
        )


class Rotation:
    """Rotates heads of a step's tokens, in place. Shapes: [tokens, 1, rotary_dim] both."""

    def __init__(self, cosines: torch.Tensor, sines: torch.Tensor) -> None:
        self._cosines = cosines
        #: The sign of the rotated half is in it: [-sin, sin].
        self._sines = sines
        self._rotary_dim = cosines.shape[-1]

    def __call__(self, heads: torch.Tensor) -> None:
        """Rotate `heads`, [tokens, heads, head_dim], of compute type."""
        part = heads[..., : self._rotary_dim]
        turned = part.roll(self._rotary_dim // 2, -1)
        part.copy_((part * self._cosines).addcmul_(turned, self._sines))


class CompiledRotation(Rotation):
    """The same by the CPU's kernel. Shapes: [tokens, rotary_dim] both."""

    def __init__(self, found: Kernels, cosines: torch.Tensor, sines: torch.Tensor) -> None:
        super().__init__(cosines, sines)
        self._kernels = found

    def __call__(self, heads: torch.Tensor) -> None:
        """See Rotation."""
        self._kernels.rotate(heads, self._cosines, self._sines)
