"""Temperature, top-k, top-p, min-p and greedy choice, for a whole batch at once.

In this order (that of `transformers`): logits / temperature; the k likeliest;
of these, the fewest whose renormalised probability reaches p; of these, those
with at least min_p of the best one's probability. Each filter is a least logit,
so tokens that tie with the last one kept are kept.

The choice is a race (https://arxiv.org/abs/1611.01144): the token with the
smallest noise / probability wins, where noise is exponential and keyed by seed,
position and token id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.sampling.noise import exponential, row_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace.params import SamplingParams

#: Fields of SamplingParams that this sampler, or the engine core around it, obeys.
SUPPORTED = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop_token_ids",
        "ignore_eos",
    }
)  # fmt: skip

#: Candidates looked at before all are: enough for nearly all filtered rows.
NUM_CANDIDATES = 256
#: Rows whose noise over the whole vocabulary is made at a time, so that it stays in cache.
_RACE_ROWS = 4


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The parameters of the rows that are not greedy, as tensors of [rows]."""

    #: Where these rows stand among all.
    rows: torch.Tensor
    num_rows: int
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    keys: torch.Tensor
    #: Some row has top-k or top-p; some row has min-p.
    is_cut: bool
    has_min_p: bool

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> SamplingBatch:
        """The batch for rows whose sampled tokens will stand at `positions`."""
        rows = [i for i, item in enumerate(params) if item.temperature > 0]
        chosen = [params[i] for i in rows]
        seeds = [(item.seed or 0) - ((item.seed or 0) >> 63 << 64) for item in chosen]

        def floats(name: str) -> torch.Tensor:
            return torch.tensor([getattr(item, name) for item in chosen], device=device)

        keys = row_keys(
            torch.tensor(seeds, dtype=torch.int64),
            torch.tensor([positions[i] for i in rows], dtype=torch.int64),
        )
        top_k = [min(item.top_k or vocab_size, vocab_size) for item in chosen]
        return cls(
            rows=torch.tensor(rows, dtype=torch.int64, device=device),
            num_rows=len(rows),
            temperature=floats("temperature"),
            top_k=torch.tensor(top_k, dtype=torch.int64, device=device),
            top_p=floats("top_p"),
            min_p=floats("min_p"),
            keys=keys.to(device),
            is_cut=any(item.top_k or item.top_p < 1 for item in chosen),
            has_min_p=any(item.min_p for item in chosen),
        )

    def select(self, index: torch.Tensor) -> SamplingBatch:
        """The same of fewer rows, `rows` counted among these."""
        return SamplingBatch(
            index, len(index), self.temperature[index], self.top_k[index], self.top_p[index],
            self.min_p[index], self.keys[index], self.is_cut, self.has_min_p,
        )  # fmt: skip


def sample(
    logits: torch.Tensor, batch: SamplingBatch, num_candidates: int = NUM_CANDIDATES
) -> torch.Tensor:
    """A token for each row. Shapes: [rows, vocab] float32 -> [rows] int64.

    `num_candidates` is for speed only: any number gives the same tokens.
    """
    tokens = logits.argmax(-1)
    if batch.num_rows:
        scaled = logits if batch.num_rows == len(logits) else logits[batch.rows]
        scaled = scaled / batch.temperature[:, None]
        tokens[batch.rows] = _choose(scaled, batch, num_candidates)
    return tokens


def _choose(scaled: torch.Tensor, batch: SamplingBatch, num_candidates: int) -> torch.Tensor:
    """Tokens for rows that are not greedy: among few candidates where that is exact."""
    vocab_size = scaled.shape[1]
    best = scaled.amax(-1)
    least = best + batch.min_p.log() if batch.has_min_p else torch.full_like(best, -torch.inf)
    if not batch.is_cut:
        return _race_all(scaled, least, batch.keys)
    count = min(num_candidates, vocab_size)
    values, ids = scaled.topk(count)
    cut = torch.maximum(_cut(values, scaled, batch), least)
    tokens = _race(values, cut, batch.keys, ids.int())
    # What ties with the last candidate, or is likelier, may be missing.
    open_rows = (cut <= values[:, -1]).nonzero().flatten() if count < vocab_size else ids[:0, 0]
    if len(open_rows):
        fewer = batch.select(open_rows)
        everything = scaled[open_rows]
        ordered = everything.sort(descending=True).values
        cut = torch.maximum(_cut(ordered, everything, fewer), least[open_rows])
        tokens[open_rows] = _race_all(everything, cut, fewer.keys)
    return tokens


def _cut(ordered: torch.Tensor, scaled: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The least logit that top-k and top-p keep, at or above the last of `ordered`.

    Shapes: ordered [rows, n] descending, scaled [rows, vocab] -> [rows]. Sums are
    in float64, so that a row's cut does not depend on how a sum over it was split.
    """
    best = ordered[:, :1]
    mass = (ordered - best).exp_().double()
    reached = mass.cumsum(-1)
    count = ordered.shape[1]
    within_k = torch.arange(count, device=ordered.device) < batch.top_k[:, None]
    total = (scaled - best).exp_().sum(-1, dtype=torch.float64)
    of_k = reached.gather(1, (batch.top_k.clamp(max=count) - 1)[:, None]).squeeze(1)
    total = torch.where(batch.top_k <= count, of_k, total)
    kept = within_k & (reached - mass < (batch.top_p * total)[:, None])
    kept[:, 0] = True
    cut = ordered.gather(1, kept.sum(-1, keepdim=True) - 1).squeeze(1)
    nothing_cut = (batch.top_k >= scaled.shape[1]) & (batch.top_p >= 1)
    return cut.masked_fill(nothing_cut, -torch.inf)


def _race(
    scaled: torch.Tensor, least: torch.Tensor, keys: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """The winner's token id in each row, among logits at or above `least`."""
    times = exponential(keys, token_ids).log_()
    speed = (scaled - times).masked_fill_(scaled < least[:, None], -torch.inf)
    return token_ids.expand(speed.shape).gather(1, speed.argmax(-1, keepdim=True)).squeeze(1).long()


def _race_all(scaled: torch.Tensor, least: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    token_ids = torch.arange(scaled.shape[1], dtype=torch.int32, device=scaled.device)[None]
    pieces = [
        _race(scaled[at : at + _RACE_ROWS], least[at : at + _RACE_ROWS],
              keys[at : at + _RACE_ROWS], token_ids)
        for at in range(0, len(scaled), _RACE_ROWS)
    ]  # fmt: skip
    return torch.cat(pieces)
