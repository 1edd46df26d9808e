"""What is added to single logits: biases, and minus infinity where a token is not allowed.

Bad tokens are looked for in the output only, and end tokens are not allowed
before min_tokens, as in vLLM. What depends on the output is found on the host from
the last few tokens, for rows that ask, and for no others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from headrace.params import SamplingParams
    from services.worker.plan import ScheduledSequence


def is_edited(params: SamplingParams) -> bool:
    """Whether single logits of such a row may change."""
    return bool(params.logit_bias or params.bad_token_sequences or params.min_tokens)


class Edits:
    """The edits of some rows of a batch."""

    def __init__(
        self, items: Sequence[ScheduledSequence], vocab_size: int, device: torch.device
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        biases: list[tuple[int, float]] = []
        banned: list[int] = []
        #: Rows with longer bad sequences; rows with min_tokens.
        self._watched: list[tuple[int, list[list[int]]]] = []
        self._short: list[int] = []
        for row, item in enumerate(items):
            params, offset = item.sampling, row * vocab_size
            biases += [(offset + token, bias) for token, bias in params.logit_bias]
            banned += [offset + ids[0] for ids in params.bad_token_sequences if len(ids) == 1]
            if longer := [list(ids) for ids in params.bad_token_sequences if len(ids) > 1]:
                self._watched.append((row, longer))
            if params.min_tokens:
                self._short.append(row)
        self._banned = self._places(banned)
        self._biased = self._places(token for token, _ in biases)
        self._biases = torch.tensor([bias for _, bias in biases], device=device)

    def apply(self, logits: torch.Tensor, items: Sequence[ScheduledSequence]) -> None:
        """Edit in place. Shape: [all rows, vocab]."""
        flat = logits.view(-1)
        if len(self._banned):
            flat[self._banned] = -torch.inf
        if self._watched or self._short:
            now = [*self._completing(items), *self._too_early(items)]
            if now:
                flat[self._places(now)] = -torch.inf
        if len(self._biased):
            # Ids of a row are distinct, and minus infinity stays what it is.
            flat[self._biased] += self._biases

    def _completing(self, items: Sequence[ScheduledSequence]) -> Iterable[int]:
        """Tokens that would complete a bad sequence."""
        for row, sequences in self._watched:
            item = items[row]
            num_generated = len(item.tokens) - item.num_prompt_tokens
            for ids in sequences:
                before = len(ids) - 1
                if num_generated >= before and list(item.tokens[-before:]) == ids[:-1]:
                    yield row * self._vocab_size + ids[-1]

    def _too_early(self, items: Sequence[ScheduledSequence]) -> Iterable[int]:
        """End tokens of rows that have not reached min_tokens."""
        for row in self._short:
            item = items[row]
            if len(item.tokens) - item.num_prompt_tokens < item.sampling.min_tokens:
                for token in item.end_token_ids:
                    yield row * self._vocab_size + token

    def _places(self, places: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(places), dtype=torch.int64, device=self._device)
