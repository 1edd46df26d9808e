"""Every way to attend computes what the plain one does, and writes the same cache."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from headrace.params import SamplingParams
from services.worker.engines.torch.attention import (
    ATTENTION,
    KVCache,
    attention_class,
    spans_of,
)
from services.worker.engines.torch.device import Placement
from services.worker.model_config import LayerAttention
from services.worker.plan import ScheduledSequence, StepPlan

NUM_BLOCKS, BLOCK_SIZE = 40, 4


@dataclass(frozen=True)
class Shape:
    num_layers: int = 1
    num_kv_heads: int = 2
    head_dim: int = 8
    num_heads: int = 6
    attention: tuple[LayerAttention, ...] = (LayerAttention(),)


def plan_of(*runs: tuple[int, int, list[int]]) -> StepPlan:
    """Sequences of (start, tokens, block table)."""
    return StepPlan(
        [
            ScheduledSequence(i, [0] * count, start, table, True, SamplingParams())
            for i, (start, count, table) in enumerate(runs)
        ]
    )


PLANS = {
    "first token": plan_of((0, 1, [3])),
    "decode, consecutive blocks": plan_of((13, 1, [5, 6, 7, 8])),
    "decode, scattered blocks": plan_of((13, 1, [9, 2, 30, 11])),
    "decode, consecutive blocks and then others": plan_of((51, 1, [*range(9, 19), 3, 30, 29])),
    "decode, consecutive blocks and then others in a row": plan_of(
        (51, 1, [*range(9, 19), 30, 31, 32])
    ),
    "decodes of several lengths": plan_of(
        (0, 1, [1]), (7, 1, [2, 3]), (8, 1, [4, 9, 6]), (33, 1, [*range(10, 19)])
    ),
    "table longer than needed": plan_of((2, 1, [4, 5, 6])),
    "prefill": plan_of((0, 11, [0, 1, 2])),
    "prefill after a cached prefix": plan_of((8, 7, [3, 1, 20, 22])),
    "prefill longer than a slice": plan_of((5, 149, [*range(39)])),
    "decodes and prefills": plan_of(
        (3, 1, [0]), (21, 1, [1, 3, 5, 7, 9, 11]), (4, 6, [2, 4, 6]), (0, 9, [20, 21, 22])
    ),
    "a prefill's single last token amid others": plan_of(
        (3, 1, [0]), (4, 6, [2, 4, 6]), (9, 1, [20, 22, 23])
    ),
    "shared prefix": plan_of((9, 1, [1, 2, 3]), (8, 2, [1, 2, 4])),
}


OPTIONS = {
    "plain": LayerAttention(),
    "window": LayerAttention(window=5),
    "window of one": LayerAttention(window=1),
    "window over a slice": LayerAttention(window=130),
    "scale": LayerAttention(scale=0.2),
    "soft cap": LayerAttention(soft_cap=0.7),
    "all": LayerAttention(window=6, scale=0.5, soft_cap=2.0),
}


def make_cache(options: LayerAttention = OPTIONS["plain"]) -> KVCache:
    cpu = Placement(torch.device("cpu"), torch.float32, torch.float32)
    cache = KVCache(Shape(attention=(options,)), NUM_BLOCKS, BLOCK_SIZE, cpu)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    cache.layers[0].copy_(torch.randn(cache.layers[0].shape, generator=generator))
    return cache


@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "plain"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_agrees_with_plain(name: str, plan: StepPlan, options: LayerAttention) -> None:
    torch.manual_seed(2)
    heads = torch.randn(plan.num_tokens, Shape.num_heads + 2 * Shape.num_kv_heads, Shape.head_dim)
    # As in a model: slices of one product, so not contiguous.
    query, key_value = heads[:, : Shape.num_heads], heads[:, Shape.num_heads :]
    results, caches = [], []
    for way in ("plain", name):
        cache = make_cache(options)
        attend = attention_class(way)(cache, spans_of(plan, BLOCK_SIZE))
        results.append(attend(0, query, key_value))
        caches.append(cache.layers[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(caches[0], caches[1])
    assert results[1].is_contiguous()


def test_plain_with_options_is_the_formula() -> None:
    """One query at position 12 under a window of 6 sees positions 7 to 12."""
    options = OPTIONS["all"]
    cache = make_cache(options)
    stored = cache.layers[0].flatten(1, 2).clone()
    query, key_value = torch.randn(1, 6, 8), torch.randn(1, 4, 8)
    stored[:, 12] = key_value[0]
    plan = plan_of((12, 1, [0, 1, 2, 3]))
    found = attention_class("plain")(cache, spans_of(plan, BLOCK_SIZE))(0, query, key_value)
    for head in range(6):
        keys, values = stored[head // 3, 7:13], stored[2 + head // 3, 7:13]
        scores = torch.tanh(keys @ query[0, head] * 0.5 / 2.0) * 2.0
        torch.testing.assert_close(found[0, head], scores.softmax(0) @ values)


@pytest.mark.parametrize("name", ATTENTION)
def test_writes_only_its_slots(name: str) -> None:
    plan = plan_of((6, 3, [7, 2, 5]))
    cache, before = make_cache(), make_cache()
    rows = torch.randn(3, 4, 8)
    attention_class(name)(cache, spans_of(plan, BLOCK_SIZE))(0, torch.randn(3, 6, 8), rows)
    written = (cache.layers[0] != before.layers[0]).all(-1).all(0).nonzero().tolist()
    assert written == [[2, 2], [2, 3], [5, 0]]
    assert torch.equal(cache.layers[0][:, 2, 2], rows[0])
    assert torch.equal(cache.layers[0][:, 5, 0], rows[2])


@pytest.mark.parametrize("name", ATTENTION)
def test_sees_nothing_later_and_nothing_of_others(name: str) -> None:
    """Other blocks and later slots hold NaN: one look at them would show."""
    cache = make_cache()
    table = random.Random(0).sample(range(NUM_BLOCKS), 3)
    keep = cache.layers[0].clone()
    cache.layers[0].fill_(float("nan") if name != "batched" else 1e4)
    for index, block in enumerate(table):
        cache.layers[0][:, block, : max(0, 9 - index * BLOCK_SIZE)] = keep[
            :, block, : max(0, 9 - index * BLOCK_SIZE)
        ]
    plan = plan_of((8, 1, table))
    result = attention_class(name)(cache, spans_of(plan, BLOCK_SIZE))(
        0, torch.randn(1, 6, 8), torch.zeros(1, 4, 8)
    )
    assert result.isfinite().all()
    assert result.abs().max() < 10


@pytest.mark.parametrize("way", ["slices", "causal to the last key"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_prefill_for_gpus(
    monkeypatch: pytest.MonkeyPatch, options: LayerAttention, way: str
) -> None:
    """As on CUDA: many slices, and where there is fused attention, it aligned to the end."""
    from services.worker.engines.torch.attention import decode, prefill

    monkeypatch.setattr(prefill, "SLICE_SCORES", 0)
    monkeypatch.setattr(decode, "GATHERED_POSITIONS", 1)
    monkeypatch.setattr(prefill, "_has_flash", lambda *_: way != "slices")
    plan = plan_of(
        (33, 1, [*range(10, 19)]), (0, 1, [1]), (5, 99, [*range(26)]), (0, 20, [*range(30, 35)])
    )
    torch.manual_seed(2)
    heads = torch.randn(plan.num_tokens, 10, 8)
    results = [
        attention_class(name)(make_cache(options), spans_of(plan, BLOCK_SIZE))(
            0, heads[:, :6], heads[:, 6:]
        )
        for name in ("plain", "batched")
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
