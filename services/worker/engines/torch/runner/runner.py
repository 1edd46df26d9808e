"""A step plan as tensors, through the model, to tokens.

It knows shapes and devices; it decides nothing about sequences and blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.attention import attend_step, attention_class, best_attention
from services.worker.engines.torch.device import on_device
from services.worker.engines.torch.runner.decode_steps import DecodeSteps
from services.worker.engines.torch.sampling import Sampler, score_prompts
from services.worker.plan import StepResult

if TYPE_CHECKING:
    from services.worker.engines.torch.attention import KVCache
    from services.worker.engines.torch.models import Model
    from services.worker.plan import StepPlan


class TorchRunner:
    """See services.worker.plan.Runner. `attention` is an entry of ATTENTION, or "auto".

    On CUDA, steps of at most `graph_rows` sequences that all decode are replayed from
    graphs; 0: none. Of a model whose operations depend on values, as experts do, no graph
    can be made.
    """

    def __init__(
        self, model: Model, cache: KVCache, attention: str = "auto", graph_rows: int = 0
    ) -> None:
        self._model = model
        self._cache = cache
        if attention == "auto":
            attention = best_attention(cache)
        self._attention = attention_class(attention)
        self._decodes: DecodeSteps | None = None
        if graph_rows and cache.device.type == "cuda":
            self._decodes = DecodeSteps(model, cache, graph_rows, capture=True)
        self._sampler = Sampler()

    def execute(self, plan: StepPlan) -> StepResult:
        """See Runner. Logits are made only for rows that are sampled from."""
        asked = [item for item in plan.scheduled if item.sample]
        with torch.inference_mode():
            logits = self._decodes.logits(plan) if self._decodes is not None else None
            if logits is not None:
                return self._sampler.sample(logits, asked)
            hidden, rows = self._forward(plan)
            result = StepResult([])
            if asked:
                result = self._sampler.sample(self._model.logits(hidden[rows]).float(), asked)
            if any(item.scored for item in plan.scheduled):
                result.prompt_logprobs.update(score_prompts(plan, hidden, self._model.logits))
            return result

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """The logits that `execute` would sample from: [sampled rows, vocab] float32.

        They are overwritten by the next step.
        """
        with torch.inference_mode():
            if self._decodes is not None and (found := self._decodes.logits(plan)) is not None:
                return found
            hidden, rows = self._forward(plan)
            return self._model.logits(hidden[rows]).float()

    def forward(self, plan: StepPlan) -> torch.Tensor:
        """Compute all scheduled tokens and store their KV: [tokens, hidden]."""
        return self._forward(plan)[0]

    def _forward(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, and the rows to sample from."""
        tokens, positions, rows = on_device(
            self._cache.device,
            [token for item in plan.scheduled for token in item.token_ids],
            [p for item in plan.scheduled for p in range(item.start, item.end)],
            _sampled_rows(plan),
        )
        attend = attend_step(self._attention, self._cache, plan)
        return self._model(tokens, positions, attend), rows


def _sampled_rows(plan: StepPlan) -> list[int]:
    rows, row = [], -1
    for item in plan.scheduled:
        row += len(item.token_ids)
        if item.sample:
            rows.append(row)
    return rows
