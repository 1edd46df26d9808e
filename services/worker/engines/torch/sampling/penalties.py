"""Repetition, frequency and presence penalties, from counts that are kept on the device.

A sequence's slot holds how often it has each token of the vocabulary, and beside
that the ids that it has, so that a step reads and writes only those. Counts follow
the sequence's token list: by the tokens that a step added, or anew from the list
when that is not what happened (a resume, a preemption).

Like vLLM's: repetition is over prompt and output, the other two over the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace.params import SamplingParams
    from services.worker.plan import ScheduledSequence

#: Added to a token's count if the prompt has it; counts stay below.
_IN_PROMPT = 1 << 30
_LEAST_WIDTH = 256


def is_penalized(params: SamplingParams) -> bool:
    """Whether any penalty is set."""
    return bool(
        params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
    )


class Penalties:
    """Penalties of the sequences that want some.

    Memory: 4 bytes for each token of the vocabulary, and 8 for each token of the
    longest sequence, times the most sequences that wanted penalties at one time.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        # [slots, vocab] and [slots, width].
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._seen = torch.zeros(0, _LEAST_WIDTH, dtype=torch.int64, device=device)
        self._num_seen = torch.zeros(0, dtype=torch.int64, device=device)
        # By sequence id: its slot, its token list, and how much of it is counted.
        self._slots: dict[int, int] = {}
        self._tokens: dict[int, Sequence[int]] = {}
        self._lengths: dict[int, int] = {}
        self._rows: list[int] = []

    def bind(self, items: Sequence[ScheduledSequence]) -> None:
        """From now on `apply` is for these rows; others are forgotten."""
        self._rows = [row for row, item in enumerate(items) if is_penalized(item.sampling)]
        wanted = {items[row].sequence_id: items[row] for row in self._rows}
        for sequence_id in self._slots.keys() - wanted.keys():
            self._forget(sequence_id)
        for sequence_id, item in wanted.items():
            if self._tokens.get(sequence_id) is not item.tokens:
                self._forget(sequence_id)
        for sequence_id, item in wanted.items():
            if sequence_id not in self._slots:
                self._enter(item)
        params = [items[row].sampling for row in self._rows]
        slots = [self._slots[sequence_id] for sequence_id in wanted]
        self._repetition = self._column([item.repetition_penalty for item in params])
        self._frequency = self._column([item.frequency_penalty for item in params])
        self._presence = self._column([item.presence_penalty for item in params])
        self._index = torch.tensor(slots, dtype=torch.int64, device=self._device)
        # Where each row begins in the flat logits.
        rows = torch.tensor(self._rows, dtype=torch.int64, device=self._device)
        self._offsets = rows[:, None] * self._vocab_size
        self._width = max((self._lengths[sequence_id] for sequence_id in wanted), default=0)

    def apply(self, logits: torch.Tensor, items: Sequence[ScheduledSequence]) -> None:
        """Take in what was generated since, and penalize in place. Shape: [all rows, vocab]."""
        if not self._rows:
            return
        self._follow([items[row] for row in self._rows])
        seen = self._seen[self._index, : self._width]
        counts = self._counts[self._index[:, None], seen]
        generated = counts & (_IN_PROMPT - 1)
        flat = logits.view(-1)
        places = seen + self._offsets
        values = flat[places]
        values = torch.where(values > 0, values / self._repetition, values * self._repetition)
        values -= self._frequency * generated
        values -= self._presence * (generated > 0)
        flat[places] = values

    def _follow(self, items: Sequence[ScheduledSequence]) -> None:
        lengths, known = self._lengths, self._tokens
        behind = [
            len(item.tokens) - lengths[item.sequence_id]
            if known[item.sequence_id] is item.tokens
            else -1
            for item in items
        ]
        if behind == [1] * len(items):
            last = [item.tokens[-1] for item in items]
            self._add(torch.tensor(last, dtype=torch.int64, device=self._device))
        else:
            for item, missing in zip(items, behind, strict=True):
                if missing:
                    known[item.sequence_id] = item.tokens
                    self._count(item)
        for item in items:
            lengths[item.sequence_id] = len(item.tokens)
        self._width = max(lengths.values())

    def _add(self, tokens: torch.Tensor) -> None:
        """One generated token for each row: [rows]."""
        self._widen(self._width + 1)
        before = self._counts[self._index, tokens]
        self._counts[self._index, tokens] = before + 1
        # One that was seen before is written behind the others, where it only repeats.
        self._seen[self._index, self._num_seen[self._index]] = tokens
        self._num_seen[self._index] += before == 0

    def _enter(self, item: ScheduledSequence) -> None:
        taken = set(self._slots.values())
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        if slot == len(self._counts):
            more = max(1, slot)
            self._counts = torch.cat((self._counts, self._counts.new_zeros(more, self._vocab_size)))
            self._seen = torch.cat((self._seen, self._seen.new_zeros(more, self._seen.shape[1])))
            self._num_seen = torch.cat((self._num_seen, self._num_seen.new_zeros(more)))
        self._slots[item.sequence_id] = slot
        self._tokens[item.sequence_id] = item.tokens
        self._count(item)

    def _forget(self, sequence_id: int) -> None:
        self._slots.pop(sequence_id, None)
        self._tokens.pop(sequence_id, None)
        self._lengths.pop(sequence_id, None)

    def _count(self, item: ScheduledSequence) -> None:
        """Count all tokens of a sequence."""
        slot = self._slots[item.sequence_id]
        tokens = torch.tensor(item.tokens, dtype=torch.int64, device=self._device)
        prompt, generated = tokens.tensor_split([item.num_prompt_tokens])
        counts = self._counts[slot].zero_()
        counts[prompt] = _IN_PROMPT
        counts.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
        distinct = torch.unique(tokens)
        self._widen(len(tokens))
        # Entries behind the last repeat one: what is written twice is equal.
        self._seen[slot] = distinct[0]
        self._seen[slot, : len(distinct)] = distinct
        self._num_seen[slot] = len(distinct)
        self._lengths[item.sequence_id] = len(tokens)

    def _widen(self, width: int) -> None:
        """Room for `width` entries and one more; new ones repeat each slot's first."""
        have = self._seen.shape[1]
        if width >= have:
            more = self._seen[:, :1].expand(-1, max(have, width + 1 - have))
            self._seen = torch.cat((self._seen, more), 1)

    def _column(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None]
