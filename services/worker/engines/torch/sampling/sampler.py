"""Logits and parameters to tokens, for all rows of a step.

In order: what the mask forbids; end tokens before min_tokens and bad tokens;
logit bias; penalties; then temperature, filters and the choice. What is made of
the parameters is kept as long as the same sequences are sampled, so that a usual
step does nothing row by row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.engines.torch.device import on_device
from services.worker.engines.torch.sampling.batch import SamplingBatch
from services.worker.engines.torch.sampling.choice import choose
from services.worker.engines.torch.sampling.edits import Edits, is_edited
from services.worker.engines.torch.sampling.logprobs import Scores
from services.worker.engines.torch.sampling.penalties import Penalties, is_penalized
from services.worker.plan import StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from headrace.params import SamplingParams
    from services.worker.plan import ScheduledSequence

#: Fields of SamplingParams that this sampler, or the engine core around it, obeys.
SUPPORTED = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop_token_ids",
        "ignore_eos", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "logit_bias", "min_tokens", "stop_token_sequences", "bad_token_sequences", "logprobs",
        "prompt_logprobs",
    }
)  # fmt: skip


class Sampler:
    """Samples for one engine. Not thread-safe.

    Its state is a cache: what it returns depends on the logits and the items alone.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._params: list[SamplingParams] = []
        self._batch: SamplingBatch | None = None
        self._penalties: Penalties | None = None
        self._edits: Edits | None = None
        self._scored: list[int] = []

    def sample(
        self,
        logits: torch.Tensor,
        items: Sequence[ScheduledSequence],
        mask: Callable[[torch.Tensor], None] | None = None,
    ) -> StepResult:
        """A token for each of `items`, whose last tokens' logits are the rows.

        Shape: [rows, vocab] float32; it is overwritten. `mask` may set logits to minus
        infinity in place, before all else; it must leave each row a token.
        """
        batch = self._bind(logits, items)
        scores = None
        if self._scored:
            counts = [items[row].sampling.logprobs or 0 for row in self._scored]
            # Indexing copies; all rows are taken as they are if nothing overwrites them.
            is_changed = mask or self._edits or self._penalties
            takes_all = not is_changed and len(counts) == len(items)
            scores = Scores(logits if takes_all else logits[self._scored], counts)
        if mask is not None:
            mask(logits)
        if self._edits is not None:
            self._edits.apply(logits, items)
        if self._penalties is not None:
            self._penalties.apply(logits, items)
        (positions,) = on_device(logits.device, [item.end for item in items])
        tokens = choose(logits, batch, positions)
        result = StepResult(tokens.tolist())
        if scores is not None:
            records = scores.pack(tokens[self._scored])
            result.logprobs.update(zip(self._scored, records, strict=True))
        return result

    def _bind(self, logits: torch.Tensor, items: Sequence[ScheduledSequence]) -> SamplingBatch:
        """What the parameters of these rows come to; kept until other rows come."""
        ids = [item.sequence_id for item in items]
        params = [item.sampling for item in items]
        # Lists compare their elements' identity first.
        if self._batch is not None and ids == self._ids and params == self._params:
            return self._batch
        vocab_size, device = logits.shape[1], logits.device
        self._ids, self._params = ids, params
        self._batch = SamplingBatch.of(params, vocab_size, device)
        self._scored = [row for row, item in enumerate(params) if item.logprobs is not None]
        self._edits = Edits(items, vocab_size, device) if any(map(is_edited, params)) else None
        if any(map(is_penalized, params)):
            if self._penalties is None:
                self._penalties = Penalties(vocab_size, device)
            self._penalties.bind(items)
        else:
            self._penalties = None
        return self._batch
