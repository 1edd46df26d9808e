"""Temperature, top-k, top-p, min-p and greedy choice, for a whole batch at once.

In this order (that of `transformers`): logits / temperature; the k likeliest;
of these, the fewest whose renormalised probability reaches p; of these, those
with at least min_p of the best one's probability. Each filter is a least logit,
so tokens that tie with the last one kept are kept.

The choice is two races (https://arxiv.org/abs/1611.01144), where the smallest
noise / probability wins: first among blocks of token ids, with their summed
probability, then among the winner's tokens. That has the distribution of one race
among all tokens, for a hundredth of the noise, which is exponential and keyed by
seed, position and block or token id: so few candidates choose as all do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.sampling.noise import exponential, row_keys
from services.worker.engines.torch.sampling.top import argmax, descending, top

if TYPE_CHECKING:
    from services.worker.engines.torch.sampling.batch import Rows, SamplingBatch

#: Candidates looked at before all are, few and then many: enough for nearly all rows.
NUM_CANDIDATES = (64, 1024)
#: Token ids in one block of the race.
RACE_BLOCK = 128
#: Blocks summed before all are.
NUM_BLOCKS = 48
#: Logits worked on at a time, so that they stay in cache.
_PIECE_LEN = 1 << 19
#: Sets the noise of blocks apart from that of tokens.
_BLOCK_SALT = 0x5851F42D4C957F2D


def choose(
    logits: torch.Tensor,
    batch: SamplingBatch,
    positions: torch.Tensor,
    num_candidates: tuple[int, ...] = NUM_CANDIDATES,
) -> torch.Tensor:
    """A token for each row, which will stand at `positions`.

    Shapes: logits [rows, vocab] float32, positions [rows] int64 -> [rows] int64.
    `num_candidates`, ascending, is for speed only: any numbers give the same tokens.
    """
    if batch.is_greedy:
        return argmax(logits)
    keys = row_keys(batch.seeds, positions)
    if batch.free is not None and len(batch.free.index) == batch.num_rows:
        return _draw_all(logits, batch.free, keys)
    if batch.cut is not None and len(batch.cut.index) == batch.num_rows:
        return _draw_cut(logits, batch.cut, keys, num_candidates)
    tokens = argmax(logits)
    if (free := batch.free) is not None:
        tokens[free.index] = _draw_all(logits[free.index], free, keys[free.index])
    if (cut := batch.cut) is not None:
        drawn = _draw_cut(logits[cut.index], cut, keys[cut.index], num_candidates)
        tokens[cut.index] = drawn
    return tokens


def _draw_cut(
    logits: torch.Tensor,
    rows: Rows,
    keys: torch.Tensor,
    num_candidates: tuple[int, ...],
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """For rows with a filter: among few candidates where that is exact.

    `total` is what `_total` gives, if it is known.
    """
    vocab_size = logits.shape[1]
    count = next((n for n in num_candidates if n < vocab_size), vocab_size)
    if count == vocab_size:
        ordered = descending(logits) / rows.temperature[:, None]
        return _draw_all(logits, rows, keys, _cut(ordered, None, rows, vocab_size))
    if total is None and rows.widest_k > count:
        total = _total(logits, rows)
    values, ids = top(logits, count)
    values = values / rows.temperature[:, None]
    cut = _cut(values, total, rows, vocab_size)
    tokens = _race_some(values, cut, keys, ids)
    # What ties with the last candidate, or is likelier, may be missing; and of what top-p
    # keeps a part is known only if all of the k are here.
    is_open = (rows.top_k > count) & (rows.top_k < vocab_size) & (rows.top_p < 1)
    left = (is_open | (cut <= values[:, -1])).nonzero().flatten()
    if len(left):
        more = tuple(n for n in num_candidates if n > count)
        rest = None if total is None else total[left]
        tokens[left] = _draw_cut(logits[left], rows.select(left), keys[left], more, rest)
    return tokens


def log_sum(logits: torch.Tensor) -> torch.Tensor:
    """The logarithm of each row's summed exp(logit): [rows, vocab] -> [rows]."""
    ones = torch.ones(len(logits), device=logits.device)
    best = logits.gather(1, argmax(logits)[:, None]).squeeze(1)
    return best + _block_sums(logits, ones, None).sum(-1, dtype=torch.float64).log().float()


def _total(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Each row's summed exp(logit - best), after temperature: [rows] float64."""
    sums = _block_sums(logits, rows.temperature, None)
    return sums.sum(-1, dtype=torch.float64)


def _cut(
    ordered: torch.Tensor, total: torch.Tensor | None, rows: Rows, vocab_size: int
) -> torch.Tensor:
    """The least logit that the filters keep, at or above the last of `ordered`.

    Shapes: ordered [rows, n] descending, total [rows] -> [rows]. Sums are in
    float64, so that a row's cut does not depend on how a sum over it was split.
    """
    count = ordered.shape[1]
    best = ordered[:, :1]
    kept = torch.arange(count, device=ordered.device) < rows.top_k[:, None]
    all_of_k = rows.top_p >= 1
    if rows.has_top_p:
        mass = (ordered - best).exp_().double()
        reached = mass.cumsum(-1)
        whole = reached.gather(1, (rows.top_k.clamp(max=count) - 1)[:, None]).squeeze(1)
        if total is not None:
            whole = torch.where(rows.top_k <= count, whole, total)
        kept &= (reached - mass < (rows.top_p * whole)[:, None]) | all_of_k[:, None]
        kept[:, 0] = True
    cut = ordered.gather(1, kept.sum(-1, keepdim=True) - 1).squeeze(1)
    cut.masked_fill_((rows.top_k >= vocab_size) & all_of_k, -torch.inf)
    return torch.maximum(cut, best.squeeze(1) + rows.log_min_p)


def _race_some(
    values: torch.Tensor, cut: torch.Tensor, keys: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """The winner among candidates, all that are at or above `cut`: [rows, n] -> [rows]."""
    kept = values >= cut[:, None]
    blocks = token_ids // RACE_BLOCK
    weights = (values - values[:, :1]).exp_().masked_fill_(~kept, 0).double()
    sums = torch.zeros(len(values), int(blocks.max()) + 1, dtype=torch.float64, device=keys.device)
    sums = sums.scatter_add_(1, blocks, weights).gather(1, blocks)
    times = exponential(keys ^ _BLOCK_SALT, blocks.int()) / sums
    block = blocks.gather(1, times.argmin(-1, keepdim=True))
    kept &= blocks == block
    return _winner(values, kept, keys, token_ids)


def _draw_all(
    logits: torch.Tensor, rows: Rows, keys: torch.Tensor, cut: torch.Tensor | None = None
) -> torch.Tensor:
    """The winners among all tokens of each row, or all at or above `cut`."""
    vocab_size = logits.shape[1]
    num_blocks = -(-vocab_size // RACE_BLOCK)
    blocks = torch.arange(num_blocks, dtype=torch.int32, device=logits.device)[None]
    noise = exponential(keys ^ _BLOCK_SALT, blocks)
    is_long = num_blocks > 2 * NUM_BLOCKS and not vocab_size % RACE_BLOCK
    if cut is None and is_long and logits.device.type == "cpu":
        first = _likely_block(logits, rows.temperature, noise)
    else:
        first = _block(logits, rows.temperature, noise, cut)
    ids = first[:, None] * RACE_BLOCK + torch.arange(RACE_BLOCK, device=logits.device)
    kept = ids < vocab_size
    ids.clamp_(max=vocab_size - 1)
    values = logits.gather(1, ids) / rows.temperature[:, None]
    if cut is not None:
        kept &= values >= cut[:, None]
    return _winner(values, kept, keys, ids)


def _block(
    logits: torch.Tensor, temperature: torch.Tensor, noise: torch.Tensor, cut: torch.Tensor | None
) -> torch.Tensor:
    """The block that wins: logits [rows, vocab], noise [rows, blocks] -> [rows]."""
    return (noise / _block_sums(logits, temperature, cut).double()).argmin(-1)


def _likely_block(
    logits: torch.Tensor, temperature: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """As `_block`, but summing few blocks where that is enough.

    No block is heavier than if all its tokens were as likely as its best. Blocks are
    taken by the time that they would need then; once one has really been faster than
    the rest could be at best, it has won.
    """
    blocks = logits.view(len(logits), -1, RACE_BLOCK)
    best_of = blocks.amax(-1)
    best = best_of.amax(-1, keepdim=True)
    # A little more, as sums are rounded.
    bound = (best_of - best).div_(temperature[:, None]).exp_().mul_(RACE_BLOCK * 1.0001)
    soonest = (noise / bound).topk(NUM_BLOCKS + 1, largest=False)
    near = soonest.indices[:, :NUM_BLOCKS]
    weights = blocks.gather(1, near[:, :, None].expand(-1, -1, RACE_BLOCK))
    weights = weights.sub_(best[:, :, None]).div_(temperature[:, None, None]).exp_().sum(-1)
    won = (noise.gather(1, near) / weights.double()).min(-1)
    block = near.gather(1, won.indices[:, None]).squeeze(1)
    left = (won.values >= soonest.values[:, -1]).nonzero().flatten()
    if len(left):
        block[left] = _block(logits[left], temperature[left], noise[left], None)
    return block


def _winner(
    values: torch.Tensor, kept: torch.Tensor, keys: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """The race's winner among the kept tokens: [rows, n] -> [rows]."""
    speed = values - exponential(keys, token_ids.int()).log_()
    speed.masked_fill_(~kept, -torch.inf)
    return token_ids.gather(1, speed.argmax(-1, keepdim=True)).squeeze(1)


def _block_sums(
    logits: torch.Tensor, temperature: torch.Tensor, cut: torch.Tensor | None
) -> torch.Tensor:
    """Sums of exp((logit - best) / temperature), of those at or above `cut`, in each block
    of tokens: [rows, vocab] -> [rows, blocks]."""
    best = logits.gather(1, argmax(logits)[:, None])
    sums = []
    for at in _pieces(logits):
        weights = (logits[at] - best[at]).div_(temperature[at, None]).exp_()
        if cut is not None:
            weights.masked_fill_(logits[at] / temperature[at, None] < cut[at, None], 0)
        sums.append(_sum_blocks(weights))
    return torch.cat(sums)


def _sum_blocks(weights: torch.Tensor) -> torch.Tensor:
    """[rows, vocab] -> [rows, blocks], the last block maybe short."""
    vocab_size = weights.shape[1]
    whole = vocab_size // RACE_BLOCK * RACE_BLOCK
    sums = weights[:, :whole].reshape(len(weights), -1, RACE_BLOCK).sum(-1)
    if whole == vocab_size:
        return sums
    return torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True)), 1)


def _pieces(logits: torch.Tensor) -> list[slice]:
    rows, vocab_size = logits.shape
    size = max(1, _PIECE_LEN // vocab_size) if logits.device.type == "cpu" else rows
    return [slice(at, at + size) for at in range(0, rows, size)]
