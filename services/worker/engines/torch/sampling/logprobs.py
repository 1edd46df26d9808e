"""Log probabilities of the model's own distribution, packed (see headrace.logprobs)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from services.worker.engines.torch.sampling.choice import log_sum
from services.worker.engines.torch.sampling.top import top

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.worker.plan import StepPlan

#: Rows of a prompt whose logits are made at a time.
_PROMPT_ROWS = 64


class Scores:
    """The log-softmax of some rows, as far as it is reported.

    Made before logits are changed, and packed when the tokens are known.
    """

    def __init__(self, logits: torch.Tensor, counts: Sequence[int]) -> None:
        """Of logits [rows, vocab] float32, which are kept; of each row its `counts` likeliest."""
        self._logits = logits
        self._counts = counts
        self._normalizer = log_sum(logits)[:, None]
        most = max(counts)
        # Ids may be as many as the vocabulary is small.
        values, self._ids = top(logits, min(most, logits.shape[1]))
        self._values = values - self._normalizer

    def pack(self, tokens: torch.Tensor) -> list[bytes]:
        """Each row's record, given its token: [rows] int64."""
        tokens = tokens[:, None]
        chosen = self._logits.gather(1, tokens) - self._normalizer
        ids = torch.cat((tokens, self._ids), 1).to("cpu", torch.int32)
        values = torch.cat((chosen, self._values), 1).cpu()
        entries = np.empty((*ids.shape, 2), dtype="<i4")
        entries[:, :, 0] = ids.numpy()
        entries[:, :, 1] = values.numpy().view(np.int32)
        return [
            row[: 1 + count].tobytes() for row, count in zip(entries, self._counts, strict=True)
        ]


def score_prompts(
    plan: StepPlan, hidden: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, bytes]:
    """The records of all prompt tokens that a step scores, by sequence id.

    `hidden` are the states of all scheduled tokens, [tokens, hidden]; `logits_of` is
    the model's head.
    """
    found = {}
    first = 0
    for item in plan.scheduled:
        if item.scored:
            count = item.sampling.prompt_logprobs or 0
            records = []
            for at in range(item.scored.start, item.scored.stop, _PROMPT_ROWS):
                end = min(at + _PROMPT_ROWS, item.scored.stop)
                row = first + at - 1 - item.start
                logits = logits_of(hidden[row : row + end - at]).float()
                tokens = torch.tensor(item.tokens[at:end], device=hidden.device)
                records += Scores(logits, [count] * (end - at)).pack(tokens)
            found[item.sequence_id] = b"".join(records)
        first += len(item.token_ids)
    return found
