"""The Triton kernel against the gathered way. test_paged_kernel.py runs it in a process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services.worker.engines.torch.attention import paged_kernel
from services.worker.engines.torch.attention.decode import Decodes, gathered_decode
from services.worker.model_config import LayerAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE, NUM_BLOCKS = 16, 200
OPTIONS = {
    "plain": LayerAttention(),
    "window": LayerAttention(window=37),
    "window of one": LayerAttention(window=1),
    "scale": LayerAttention(scale=0.3),
    "soft cap": LayerAttention(soft_cap=0.7),
    "all": LayerAttention(window=300, scale=0.5, soft_cap=2.0),
}


@pytest.fixture
def kernel() -> Any:
    return paged_kernel


def case(
    lengths: list[int], kv_heads: int, group: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, Decodes]:
    """Rows of these lengths in scattered blocks; stored KV, queries (not contiguous), tables."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(2 * kv_heads, NUM_BLOCKS, BLOCK_SIZE, dim, generator=generator)
    heads = torch.randn(len(lengths), kv_heads * (group + 2), dim, generator=generator)
    width = -(-max(lengths) // BLOCK_SIZE) + 3
    tables = torch.stack([
        torch.randperm(NUM_BLOCKS, generator=generator)[:width] for _ in lengths
    ])  # fmt: skip
    positions = torch.tensor(lengths) - 1
    return (
        stored.to(DEVICE, dtype),
        heads.to(DEVICE, dtype)[:, : kv_heads * group],
        Decodes(tables.to(DEVICE), positions.to(DEVICE)),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("splits", [1, 5])
def test_agrees_with_gathered(
    kernel: Any, monkeypatch: pytest.MonkeyPatch, options: LayerAttention, splits: int
) -> None:
    """One position to several tiles; splits without positions; a padded table."""
    monkeypatch.setattr(kernel, "num_splits", lambda *_: splits)
    stored, query, decodes = case([1, 16, 17, 300], kv_heads=2, group=3, dim=32)
    found = kernel.paged_decode(stored, query, decodes, options)
    expected = gathered_decode(stored, query, decodes, options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kv_heads", "group", "dim"), [(1, 1, 64), (3, 3, 24), (1, 20, 16), (2, 2, 128), (1, 4, 8)]
)
def test_shapes_of_heads(kernel: Any, kv_heads: int, group: int, dim: int) -> None:
    stored, query, decodes = case([5, 70], kv_heads, group, dim)
    found = kernel.paged_decode(stored, query, decodes, LayerAttention())
    expected = gathered_decode(stored, query, decodes, LayerAttention())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_no_further_from_float32_than_gathered(
    kernel: Any, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as if it were integers")
    stored, query, decodes = case([100, 40], 2, 4, 64, dtype)
    exact = gathered_decode(stored.float(), query.float(), decodes, LayerAttention())
    found = kernel.paged_decode(stored, query, decodes, LayerAttention())
    other = gathered_decode(stored, query, decodes, LayerAttention())
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= 1.5 * (other - exact).abs().max()


def test_sees_nothing_of_others(kernel: Any) -> None:
    """Every slot that is not the row's holds NaN."""
    stored, query, decodes = case([40], 1, 2, 16)
    slots = torch.arange(40, device=DEVICE)
    mine = decodes.tables[0, slots // BLOCK_SIZE] * BLOCK_SIZE + slots % BLOCK_SIZE
    poisoned = torch.full_like(stored, float("nan"))
    poisoned.flatten(1, 2)[:, mine] = stored.flatten(1, 2)[:, mine]
    found = kernel.paged_decode(poisoned, query, decodes, LayerAttention())
    torch.testing.assert_close(
        found, gathered_decode(stored, query, decodes, LayerAttention()), rtol=1e-5, atol=1e-5
    )


def test_number_of_splits(kernel: Any) -> None:
    """One short row is not split, a long one is, many are not; an H100 has 132 processors."""
    assert kernel.num_splits(8, 200, 132) == 1
    assert kernel.num_splits(8, 1024, 132) == 4
    assert kernel.num_splits(8, 1 << 20, 132) == 33
    assert kernel.num_splits(512, 1 << 20, 132) == 1
    assert kernel.num_splits(1, 1 << 20, 132) == 64
