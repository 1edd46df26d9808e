"""Layers against their formulas, and fast ways to multiply against the plain one."""

from __future__ import annotations

import pytest
import torch

from headrace.errors import StartupError
from services.worker.engines.torch.device import Placement, place
from services.worker.engines.torch.layers import Experts, GatedMLP, HeadNorm, RMSNorm
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


def test_rms_norm() -> None:
    x, weight = torch.randn(3, 16), torch.randn(16)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(RMSNorm(weight, 1e-5)(x), expected)


def test_head_norm_normalises_each_head_in_place() -> None:
    heads, weight = torch.randn(5, 6, 8), torch.randn(3, 8)
    expected = heads.clone()
    expected[:, :3] = torch.stack(
        [RMSNorm(weight[head], 1e-5)(heads[:, head]) for head in range(3)], 1
    )
    HeadNorm(weight, 1e-5)(heads[:, :3])
    torch.testing.assert_close(heads, expected)


def test_wide_norms_keep_their_type() -> None:
    """1 + w for a small w is 1 in bfloat16: such weights are float32, and so is the product."""
    weight = torch.full((8,), 1 + 2**-10)
    x = torch.randn(3, 8).bfloat16()
    found = RMSNorm(weight, 0.0)(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, RMSNorm(weight, 0.0)(x.float()).bfloat16())


def _expert(seed: int) -> GatedMLP:
    generator = torch.Generator().manual_seed(seed)
    gate_up = PlainLinear(torch.randn(24, 8, generator=generator))
    return GatedMLP(gate_up, PlainLinear(torch.randn(8, 12, generator=generator)), 12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_used", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_experts_are_a_loop_over_tokens(rows: int, num_used: int, normalize: bool) -> None:
    router, experts = PlainLinear(torch.randn(5, 8)), [_expert(seed) for seed in range(5)]
    x = torch.randn(rows, 8)
    expected = torch.zeros_like(x)
    for row in range(rows):
        shares = router(x[row : row + 1]).softmax(-1)[0]
        chosen = shares.argsort(descending=True)[:num_used]
        total = shares[chosen].sum() if normalize else 1.0
        for number in chosen.tolist():
            expected[row] += shares[number] / total * experts[number](x[row : row + 1])[0]
    found = Experts(router, experts, num_used, normalize=normalize)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


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
