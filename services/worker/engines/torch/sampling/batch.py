"""The parameters of a step's rows as tensors, made once and kept while the rows stay.

It knows values, not what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace.params import SamplingParams

#: Below this temperature a row is greedy: logits divided by it would overflow.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that are drawn alike: tensors of [rows]."""

    #: Where these rows stand among all.
    index: torch.Tensor
    temperature: torch.Tensor
    #: The vocabulary's size where all are kept.
    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor
    has_top_p: bool
    #: The largest top_k of a row with top-p.
    widest_k: int

    @classmethod
    def of(
        cls,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        vocab_size: int,
        device: torch.device,
    ) -> Rows:
        """Those `rows` of all `params`."""
        chosen = [params[row] for row in rows]
        top_k = [min(item.top_k or vocab_size, vocab_size) for item in chosen]

        def floats(name: str) -> torch.Tensor:
            return torch.tensor([getattr(item, name) for item in chosen], device=device)

        return cls(
            index=torch.tensor(rows, dtype=torch.int64, device=device),
            temperature=floats("temperature"),
            top_k=torch.tensor(top_k, dtype=torch.int64, device=device),
            top_p=floats("top_p"),
            log_min_p=floats("min_p").log(),
            has_top_p=any(item.top_p < 1 for item in chosen),
            widest_k=max(
                (k for k, item in zip(top_k, chosen, strict=True) if item.top_p < 1), default=0
            ),
        )

    def select(self, index: torch.Tensor) -> Rows:
        """The same of fewer rows."""
        return Rows(
            self.index[index], self.temperature[index], self.top_k[index], self.top_p[index],
            self.log_min_p[index], self.has_top_p, self.widest_k,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each row of a step is drawn. Rows that are in neither group are greedy."""

    num_rows: int
    #: [all rows] int64: seeds in two's complement.
    seeds: torch.Tensor
    #: Rows without a filter, and rows with top-k, top-p or min-p.
    free: Rows | None
    cut: Rows | None

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device
    ) -> SamplingBatch:
        """The batch for rows with these parameters."""
        free: list[int] = []
        cut: list[int] = []
        for row, item in enumerate(params):
            if item.temperature >= LEAST_TEMPERATURE:
                is_cut = 0 < item.top_k < vocab_size or item.top_p < 1 or item.min_p > 0
                (cut if is_cut else free).append(row)
        seeds = [(item.seed or 0) - ((item.seed or 0) >> 63 << 64) for item in params]
        return cls(
            num_rows=len(params),
            seeds=torch.tensor(seeds, dtype=torch.int64, device=device),
            free=Rows.of(free, params, vocab_size, device) if free else None,
            cut=Rows.of(cut, params, vocab_size, device) if cut else None,
        )

    @property
    def is_greedy(self) -> bool:
        """Whether no row is drawn."""
        return self.free is None and self.cut is None
