"""The contract between the scheduler and a runner: a step's plan and its result.

Plain numbers: no tensors, no clock. A plan is a snapshot that holds during one
`execute`: a runner mutates nothing of it, and keeps no list of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace.params import SamplingParams

NO_SCORES = range(0)


#: The number of the device's tier; slower ones follow.
DEVICE = 0


class Move(NamedTuple):
    """Copy a block's content from a tier's slot to another tier's; of the device, slots
    are physical blocks."""

    source_tier: int
    source: int
    target_tier: int
    target: int


class BlockTable(NamedTuple):
    """Physical blocks of one KV group: `blocks[i]` is the sequence's block `first + i`."""

    first: int
    blocks: list[int]


class ScheduledSequence(NamedTuple):
    """A run of one sequence's tokens to compute in this step.

    Tokens `token_ids` stand at positions `start … start + len(token_ids) - 1`;
    the KV of all positions before `start` that the model still sees is in the cache.
    Position p lives in the sequence's block `p // block_size`, at `p % block_size`;
    each KV group has a table of where the blocks are, which ends with the block of
    the last position. `block_table` is group 0's, whose first entry is the sequence's
    block `first_block` (0, if its layers see all positions); the other groups' are
    in `more_tables`. (A tuple: there are many, and they are cheap.)
    """

    sequence_id: int
    token_ids: list[int]
    start: int
    block_table: list[int]
    #: Whether the last token's logits choose the next token (else: a prefill goes on).
    sample: bool
    sampling: SamplingParams
    first_block: int = 0
    more_tables: tuple[BlockTable, ...] = ()
    #: All known tokens, the prompt's first: the sequence's own list, to be read only.
    tokens: Sequence[int] = ()
    num_prompt_tokens: int = 0
    #: What ends the sequence: not to be chosen before it has its min_tokens.
    end_token_ids: frozenset[int] = frozenset()
    #: Positions of prompt tokens whose log probabilities are asked for: that of
    #: position p comes from the logits of position p - 1, which is computed here.
    scored: range = NO_SCORES

    @property
    def end(self) -> int:
        """The position after the last computed one: where a sampled token will stand."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that one step computes, sequences that decode first."""

    scheduled: list[ScheduledSequence]
    #: To be made first, in order; only of engines that have slower tiers.
    moves: list[Move] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(len(item.token_ids) for item in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens chosen, one for each scheduled sequence with `sample`, in order.

    Log probabilities are packed, see headrace.logprobs.
    """

    token_ids: list[int]
    #: Index in `token_ids` -> that token's record, where the sequence asks for it.
    logprobs: dict[int, bytes] = field(default_factory=dict)
    #: Sequence id -> the records of its `scored` tokens.
    prompt_logprobs: dict[int, bytes] = field(default_factory=dict)
    #: How much of the step's time went into bringing blocks to the device.
    transfer_ms: float = 0.0


class Runner(Protocol):
    """Computes plans. Owns the KV tensors, of `num_blocks` physical blocks."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute KV for all scheduled tokens and choose tokens where asked.

        The token chosen at a position is a function of logits, seed and position.
        """
