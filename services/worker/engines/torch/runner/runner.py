"""A step plan as tensors, through the model, to tokens.

It knows shapes and devices; it decides nothing about sequences and blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.attention import attend_step, attention_class, best_attention
from services.worker.engines.torch.sampling import Sampler, score_prompts
from services.worker.plan import StepResult

if TYPE_CHECKING:
    from services.worker.engines.torch.attention import KVCache
    from services.worker.engines.torch.models import Model
    from services.worker.plan import StepPlan


class TorchRunner:
    """See services.worker.plan.Runner. `attention` is an entry of ATTENTION, or "auto"."""

    def __init__(self, model: Model, cache: KVCache, attention: str = "auto") -> None:
        self._model = model
        self._cache = cache
        if attention == "auto":
            attention = best_attention(cache)
        self._attention = attention_class(attention)
        self._sampler = Sampler()

    def execute(self, plan: StepPlan) -> StepResult:
        """See Runner. Logits are made only for rows that are sampled from."""
        asked = [item for item in plan.scheduled if item.sample]
        with torch.inference_mode():
            hidden = self.forward(plan)
            result = StepResult([])
            if asked:
                logits = self._model.logits(hidden[self._sampled_rows(plan)]).float()
                result = self._sampler.sample(logits, asked)
            if any(item.scored for item in plan.scheduled):
                result.prompt_logprobs.update(score_prompts(plan, hidden, self._model.logits))
            return result

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """The logits that `execute` would sample from: [sampled rows, vocab] float32."""
        with torch.inference_mode():
            return self._model.logits(self.forward(plan)[self._sampled_rows(plan)]).float()

    def forward(self, plan: StepPlan) -> torch.Tensor:
        """Compute all scheduled tokens and store their KV: [tokens, hidden]."""
        device = self._cache.device
        token_ids = [token for item in plan.scheduled for token in item.token_ids]
        positions = [p for item in plan.scheduled for p in range(item.start, item.end)]
        attend = attend_step(self._attention, self._cache, plan)
        return self._model(
            torch.tensor(token_ids, device=device), torch.tensor(positions, device=device), attend
        )

    def _sampled_rows(self, plan: StepPlan) -> torch.Tensor:
        rows, row = [], -1
        for item in plan.scheduled:
            row += len(item.token_ids)
            if item.sample:
                rows.append(row)
        return torch.tensor(rows, dtype=torch.long, device=self._cache.device)
