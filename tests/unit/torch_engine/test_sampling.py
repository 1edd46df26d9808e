"""Sampling: its distribution, its filters, and that a token depends on nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from headrace.params import SamplingParams
from services.worker.engines.torch.sampling import choice
from services.worker.engines.torch.sampling.batch import SamplingBatch
from services.worker.engines.torch.sampling.choice import choose
from services.worker.engines.torch.sampling.noise import exponential, row_keys
from services.worker.engines.torch.sampling.top import argmax, descending, top

CPU = torch.device("cpu")
VOCAB = 2000


def draw(
    logits: torch.Tensor, params: list[SamplingParams], positions: list[int], **options: Any
) -> list[int]:
    batch = SamplingBatch.of(params, logits.shape[1], CPU)
    return choose(logits, batch, torch.tensor(positions), **options).tolist()


def chi_square_limit(freedom: int) -> float:
    """Five standard deviations above the mean: passes but for one fault in millions."""
    return freedom + 5 * math.sqrt(2 * freedom)


def test_noise_is_exponential() -> None:
    keys = row_keys(torch.arange(64), torch.zeros(64, dtype=torch.int64))
    draws = exponential(keys, torch.arange(4096, dtype=torch.int32)[None]).flatten()
    assert draws.min() >= 0
    counts = torch.histc(torch.exp(-draws), bins=100, min=0, max=1)
    expected = len(draws) / 100
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(99)


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_noise_of_near_seeds_positions_and_tokens_is_unrelated(bit: int) -> None:
    tokens = torch.arange(20_000, dtype=torch.int32)[None]
    flipped = (1 << bit) - (1 << 64 if bit == 63 else 0)
    keys = row_keys(torch.tensor([0, flipped, 0, 1]), torch.tensor([0, 0, 1, 0]))
    draws = exponential(keys, tokens)
    correlations = torch.corrcoef(draws)
    off_diagonal = correlations[~torch.eye(4, dtype=torch.bool)]
    if bit == 0:
        off_diagonal = torch.corrcoef(draws[:3])[~torch.eye(3, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 5 / math.sqrt(20_000)
    shifted = torch.corrcoef(torch.stack((draws[0, 1:], draws[0, :-1])))[0, 1]
    assert shifted.abs() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.7),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=0.8, top_k=7, top_p=0.8, min_p=0.1),
    ],
    ids=str,
)
def test_distribution(params: SamplingParams) -> None:
    """40,000 seeds against the probabilities of a plain implementation."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    expected = plain_probabilities(logits, params)
    num_draws = 40_000
    counts = torch.zeros(12)
    for position in range(4):
        seeds = range(position * num_draws, position * num_draws + num_draws // 4)
        batch = [
            SamplingParams(params.temperature, params.top_p, params.top_k, params.min_p, seed)
            for seed in seeds
        ]
        tokens = draw(logits.expand(len(batch), -1), batch, [position] * len(batch))
        counts += torch.bincount(torch.tensor(tokens), minlength=12)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    expected = expected[kept] * num_draws
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    assert chi_square < chi_square_limit(int(kept.sum()) - 1 or 1)


def plain_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """One row, as the sampler's docstring says, in Python."""
    scaled = (logits.double() / params.temperature).tolist()
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[: params.top_k or len(order)]
    total = sum(math.exp(scaled[i]) for i in kept)
    reached, nucleus = 0.0, []
    for i in kept:
        if reached >= params.top_p:
            break
        nucleus.append(i)
        reached += math.exp(scaled[i]) / total
    best = scaled[order[0]]
    nucleus = [i for i in nucleus if math.exp(scaled[i] - best) >= params.min_p]
    probabilities = torch.zeros(len(scaled), dtype=torch.float64)
    for i in nucleus:
        probabilities[i] = math.exp(scaled[i])
    return (probabilities / probabilities.sum()).float()


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=1, top_p=0.9),
    SamplingParams(seed=(1 << 64) - 1, top_k=50),
    SamplingParams(seed=1 << 63, top_k=1500),
    SamplingParams(seed=7, temperature=2.0, top_p=0.999),
    SamplingParams(seed=8, min_p=0.05),
    SamplingParams(seed=9, temperature=0.3, top_k=5, top_p=0.5, min_p=0.3),
    SamplingParams(seed=10, top_k=1),
    SamplingParams(temperature=0.0, top_k=5),
]


def test_a_token_is_the_same_alone_and_in_any_batch() -> None:
    logits = torch.randn(len(MIXED), VOCAB, generator=torch.Generator().manual_seed(4)) * 2
    positions = [11 * i for i in range(len(MIXED))]
    together = draw(logits, MIXED, positions)
    alone = [draw(logits[i : i + 1], [MIXED[i]], [positions[i]])[0] for i in range(len(MIXED))]
    assert together == alone
    backwards = draw(logits.flip(0), MIXED[::-1], positions[::-1])
    assert backwards[::-1] == together


@pytest.mark.parametrize("num_candidates", [(1,), (20, 300), ()])
def test_few_candidates_choose_as_all_do(num_candidates: tuple[int, ...]) -> None:
    """The fast path against its plain twin: the same race over the whole vocabulary."""
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(5)) * 3
    params = [
        SamplingParams(0.7 + 0.001 * i, (0.5, 0.9, 1.0)[i % 3], (0, 40, 600)[i % 7 % 3], 0.01, i)
        for i in range(200)
    ]
    positions = list(range(200))
    assert draw(logits, params, positions, num_candidates=num_candidates) == (
        draw(logits, params, positions)
    )


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.0])
def test_few_blocks_choose_as_all_do(scale: float, temperature: float) -> None:
    """Peaked and flat rows: a block that wins among a few wins among all."""
    vocab_size = 3 * choice.NUM_BLOCKS * choice.RACE_BLOCK
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(6)) * scale
    logits[:20, 777] += 20 * scale
    params = [SamplingParams(temperature, seed=seed) for seed in range(40)]
    batch = SamplingBatch.of(params, vocab_size, CPU)
    assert batch.free is not None
    blocks = torch.arange(3 * choice.NUM_BLOCKS, dtype=torch.int32)[None]
    noise = exponential(row_keys(batch.seeds, batch.seeds), blocks)
    temperatures = batch.free.temperature
    found = choice._likely_block(logits, temperatures, noise)
    assert torch.equal(found, choice._block(logits, temperatures, noise, None))


def test_a_large_vocabulary_is_drawn_by_its_probabilities() -> None:
    """Tokens far apart, in likely and unlikely blocks."""
    vocab_size = 3 * choice.NUM_BLOCKS * choice.RACE_BLOCK
    logits = torch.full((1, vocab_size), -5.0)
    marked = torch.tensor([3, 4, 129, 5000, vocab_size - 1])
    logits[0, marked] = torch.tensor([4.0, 5.0, 3.0, 4.5, 2.0])
    expected = logits[0].double().softmax(0)
    num_draws = 20_000
    counts = torch.zeros(vocab_size)
    for first in range(0, num_draws, 500):
        params = [SamplingParams(seed=seed) for seed in range(first, first + 500)]
        tokens = draw(logits.expand(500, -1).contiguous(), params, [9] * 500)
        counts += torch.bincount(torch.tensor(tokens), minlength=vocab_size)
    found = torch.cat((counts[marked], (num_draws - counts[marked].sum())[None]))
    wanted = torch.cat((expected[marked], (1 - expected[marked].sum())[None])) * num_draws
    assert ((found - wanted) ** 2 / wanted).sum() < chi_square_limit(5)


@pytest.mark.parametrize("vocab_size", [40, 2048, 2050, 20_480])
def test_the_best_are_found_through_their_blocks(vocab_size: int) -> None:
    logits = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(8))
    logits[:, 30] = logits[:, 7] = logits.amax(-1)
    assert argmax(logits).tolist() == logits.argmax(-1).tolist()
    assert argmax(logits).max() <= 30
    for count in (1, 5, 30, 300):
        if count <= vocab_size:
            values, ids = top(logits, count)
            assert torch.equal(values, logits.topk(count).values)
            assert torch.equal(values, logits.gather(1, ids))
            assert all(len(set(row)) == count for row in ids.tolist())
    assert torch.equal(descending(logits), logits.sort(descending=True).values)


def test_ties_at_the_cut_do_not_depend_on_candidates() -> None:
    """Hundreds of equal logits, more than there are candidates, all stay possible."""
    logits = torch.zeros(300, VOCAB)
    params = [SamplingParams(top_k=10, seed=seed) for seed in range(300)]
    tokens = draw(logits, params, [0] * 300)
    assert len(set(tokens)) > 200


def test_greedy_is_the_best_token() -> None:
    logits = torch.randn(3, VOCAB)
    assert draw(logits, [SamplingParams(temperature=0.0)] * 3, [1, 2, 3]) == (
        logits.argmax(-1).tolist()
    )
    assert draw(logits, [SamplingParams(top_k=1, seed=3)] * 3, [1, 2, 3]) == (
        logits.argmax(-1).tolist()
    )


def test_seed_and_position_matter() -> None:
    logits = torch.zeros(100, VOCAB)
    params = [SamplingParams(seed=seed) for seed in range(100)]
    assert len(set(draw(logits, params, [0] * 100))) > 80
    assert len(set(draw(logits, [SamplingParams(seed=3)] * 100, list(range(100))))) > 80
