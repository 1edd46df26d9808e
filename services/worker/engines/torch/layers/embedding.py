"""Token embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    import torch


class Embedding:
    """Rows of `weight`, [vocab, hidden], by token id, in the compute type."""

    def __init__(self, weight: torch.Tensor, compute_dtype: torch.dtype) -> None:
        self.weight = weight
        self._compute_dtype = compute_dtype

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        # [tokens] -> [tokens, hidden]
        return F.embedding(token_ids, self.weight).to(self._compute_dtype)
