"""What a timing model is asked: the work of one step, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class StepWork(NamedTuple):
    """What one step computes. (A tuple: there are many, and they are cheap.)"""

    #: Sequences that decode: one token each.
    num_decodes: int
    #: Tokens that their attention reads, their own new ones with them.
    decode_tokens: int
    #: For each chunk of a prefill: tokens computed, and tokens before them.
    prefills: Sequence[tuple[int, int]]
    #: Tokens that the KV cache has room for.
    capacity_tokens: int

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens computed in the step."""
        return sum(count for count, _ in self.prefills)


class StepTiming(Protocol):
    """One timing model. Pure: equal work takes equal time."""

    def milliseconds(self, work: StepWork) -> float:
        """Milliseconds that a step with some work takes."""
