"""GGUF's quantized blocks as float32, for the types that real files have most of.

Formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; a test holds
each equal, bit for bit, to the `gguf` library, which is slower (it reads Q5_0 of a
model of 0.5 billion weights in 30 s) and does all other types. Each takes blocks as
bytes, [n, bytes of a block] uint8, and gives [n, elements of a block].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def _half(raw: torch.Tensor) -> torch.Tensor:
    """Pairs of bytes, as float16, in float32."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Low halves of n bytes, then their high halves: [..., n] -> [..., 2n] uint8."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """A byte's bits, lowest first: [n, bytes] -> [n, 8 · bytes] uint8."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(1)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """Scale; 32 halves of bytes, centred on 8."""
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_half(blocks[:, :2]))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """Scale and minimum; 32 halves of bytes."""
    scales = _half(blocks[:, :4])
    return _nibbles(blocks[:, 4:]).float().mul_(scales[:, :1]).add_(scales[:, 1:])


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """Scale; 32 fifth bits; 32 halves of bytes; centred on 16."""
    values = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return values.float().sub_(16).mul_(_half(blocks[:, :2]))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """Scale; 32 signed bytes."""
    values = blocks[:, 2:].contiguous().view(torch.int8).float()
    return values.mul_(_half(blocks[:, :2]))


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes: [n, 12] -> two of [n, 8, 1].

    The first four of both are whole in bytes 0–3 and 4–7, whose upper bits complete
    the last four in bytes 8–11.
    """
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, last & 15 | first >> 6 << 4), 1)
    minima = torch.cat((second & 63, last >> 4 | second >> 6 << 4), 1)
    return scales.float().unsqueeze(-1), minima.float().unsqueeze(-1)


def _scaled(values: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Eight parts of 32 with a scale and a minimum each: [n, 8, 32] uint8 -> [n, 256].

    `head` [n, 16]: both scales' scale, then their 6-bit values.
    """
    outer = _half(head[:, :4]).unsqueeze(-1)  # [n, 2, 1]
    scales, minima = _six_bits(head[:, 4:])
    inner = values.float().mul_(outer[:, :1] * scales)
    return inner.sub_(outer[:, 1:] * minima).flatten(1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """A head (_scaled); four times 32 bytes, of which low and high halves are a part each."""
    values = _nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32)
    return _scaled(values, blocks[:, :16])


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """As Q4_K, with 32 bytes between whose bit j belongs to part j."""
    shifts = torch.arange(8, dtype=torch.uint8).view(8, 1)
    fifth = blocks[:, 16:48].unsqueeze(1) >> shifts & 1  # [n, 8, 32]
    values = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    return _scaled(values | fifth << 4, blocks[:, :16])


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """128 bytes with low 4 bits, 64 with high 2, 16 signed scales, their scale; centred on 32.

    Both halves of 128 elements are alike: element 32k + l has its low bits in byte
    l + 32 (k mod 2) and its high bits in bits 2k of byte l.
    """
    low = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    high = blocks[:, 128:192].view(-1, 2, 1, 32) >> shifts & 3  # [n, 2, 4, 32]
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks[:, 208:])
    values = (low | high << 4).view(-1, 16, 16).float().sub_(32)
    return values.mul_(scales.unsqueeze(-1)).flatten(1)


UNPACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
