"""Layers against their formulas, and fast ways to multiply against the plain one."""

from __future__ import annotations

import pytest
import torch

from headrace.errors import StartupError
from services.worker.engines.torch.device import Placement, place
from services.worker.engines.torch.layers import RMSNorm, Rope
from services.worker.engines.torch.layers.linear import (
    PackedLinear,
    PlainLinear,
    TwinLinear,
    can_pack,
    linear,
)

CPU = torch.device("cpu")
ROWS = [1, 2, 3, 8, 33, 130]
needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN")


@needs_packing
@pytest.mark.parametrize("rows", ROWS)
def test_packed_agrees_with_plain(rows: int) -> None:
    weight, x = torch.randn(70, 48), torch.randn(rows, 48)
    torch.testing.assert_close(PackedLinear(weight)(x), PlainLinear(weight)(x))


@needs_packing
@pytest.mark.parametrize("rows", ROWS)
def test_twin_agrees_with_plain(rows: int) -> None:
    weight, x = torch.randn(70, 48).bfloat16(), torch.randn(rows, 48)
    result = TwinLinear(weight)(x)
    assert result.dtype == torch.float32
    expected = PlainLinear(weight.float())(x)
    # One row is rounded to bfloat16's 8 bits.
    tolerance = {"rtol": 2e-2, "atol": 0.1} if rows == 1 else {}
    torch.testing.assert_close(result, expected, **tolerance)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_linear_keeps_the_compute_type(weights: torch.dtype, compute: torch.dtype) -> None:
    layer = linear(torch.randn(6, 4).to(weights), Placement(CPU, weights, compute))
    for rows in (1, 2):
        assert layer(torch.randn(rows, 4).to(compute)).dtype == compute


def test_rope_rotates_pairs_by_position() -> None:
    rope = Rope(8, 10000.0, 64, torch.float32, CPU)
    positions = torch.tensor([0, 3, 40])
    x = torch.randn(3, 2, 8)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rope.rotate(x, rope.at(positions)), expected)


def test_rms_norm() -> None:
    x, weight = torch.randn(3, 16), torch.randn(16)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(RMSNorm(weight, 1e-5)(x), expected)


def test_float32_is_float32() -> None:
    assert place("cpu", "float32") == Placement(CPU, torch.float32, torch.float32)
    assert place("cpu", "auto").weight_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", "int3", "dtype must be one of auto"),
        ("tpuu", "auto", "device must be"),
        ("meta", "auto", "device must be"),
        ("cuda:99", "auto", "CUDA devices"),
    ],
)
def test_refuses_what_is_not_there(device: str, dtype: str, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        place(device, dtype)
