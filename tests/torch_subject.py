"""Drives our runner with plans made by hand, to get logits at every position."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from headrace.params import SamplingParams
from services.worker.engines.torch.attention import KVCache
from services.worker.engines.torch.device import Placement, place
from services.worker.engines.torch.engine import load
from services.worker.engines.torch.runner import TorchRunner
from services.worker.model_config import read
from services.worker.plan import ScheduledSequence, StepPlan

if TYPE_CHECKING:
    from headrace.models.files import ModelFiles
    from services.worker.engines.torch.models import Model

BLOCK_SIZE, NUM_BLOCKS = 16, 64


class Subject:
    """Our model, with an empty cache for each call of `runner`."""

    def __init__(
        self,
        files: ModelFiles,
        dtype: str | Placement = "float32",
        context_len: int | None = None,
    ) -> None:
        found = read(files)
        self.args = replace(found, context_len=context_len or found.context_len)
        self.placement = place("cpu", dtype) if isinstance(dtype, str) else dtype
        self.model: Model = load(files, self.args, self.placement, lambda *_: None)

    def runner(self, attention: str = "auto") -> TorchRunner:
        cache = KVCache(self.args, NUM_BLOCKS, BLOCK_SIZE, self.placement)
        return TorchRunner(self.model, cache, attention)

    def logits(self, runner: TorchRunner, *items: ScheduledSequence) -> torch.Tensor:
        """Logits of all computed rows, [tokens, vocab]."""
        with torch.inference_mode():
            return self.model.logits(runner.forward(StepPlan(list(items))))


def run(tokens: list[int], start: int, end: int, table: list[int]) -> ScheduledSequence:
    """Compute positions `start` to `end` of a sequence whose KV lies in `table`."""
    return ScheduledSequence(0, tokens[start:end], start, table, True, SamplingParams())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected logit."""
    return float((found - expected).abs().max() / expected.abs().max())
