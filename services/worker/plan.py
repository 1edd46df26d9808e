"""The contract between the scheduler and a runner: a step's plan and its result.

Plain numbers: no tensors, no clock. A plan is a snapshot that holds during one
`execute`: a runner mutates nothing of it, and keeps no list of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from headrace.params import SamplingParams


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A run of one sequence's tokens to compute in this step.

    Tokens `token_ids` stand at positions `start … start + len(token_ids) - 1`;
    the KV of all positions before `start` is in the cache. Position p lives in
    physical block `block_table[p // block_size]`, at `p % block_size`; the table ends
    with the block of the last position.
    """

    sequence_id: int
    token_ids: list[int]
    start: int
    block_table: list[int]
    #: Whether the last token's logits choose the next token (else: a prefill goes on).
    sample: bool
    sampling: SamplingParams

    @property
    def end(self) -> int:
        """The position after the last computed one: where a sampled token will stand."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that one step computes, sequences that decode first."""

    scheduled: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(len(item.token_ids) for item in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens chosen, one for each scheduled sequence with `sample`, in order."""

    token_ids: list[int]


class Runner(Protocol):
    """Computes plans. Owns the KV tensors, of `num_blocks` physical blocks."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute KV for all scheduled tokens and choose tokens where asked.

        The token chosen at a position is a function of logits, seed and position.
        """
