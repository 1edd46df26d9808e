"""Executes plans without arithmetic: takes the time a model would, and chooses tokens.

It keeps one number per KV slot (see `tokens`), and reads the past only through a
plan's block table, as a real runner does.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.logprobs import pack
from services.worker.engines.sim.tokens import INITIAL_STATE, choose, fold, score
from services.worker.plan import StepResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engines.sim.clock import Clock
    from services.worker.plan import ScheduledSequence, StepPlan


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a step takes, in ms."""

    #: Every step.
    step_ms: float
    #: For each sequence that gets a token.
    step_ms_per_sequence: float
    #: For each token of a prefill.
    prefill_ms_per_token: float

    def seconds(self, plan: StepPlan) -> float:
        """What executing `plan` takes."""
        num_decodes = sum(len(item.token_ids) == 1 for item in plan.scheduled)
        num_prefilled = plan.num_tokens - num_decodes
        return (
            (self.step_ms if num_decodes else 0.0)
            + self.step_ms_per_sequence * num_decodes
            + self.prefill_ms_per_token * num_prefilled
        ) / 1000


class SimRunner:
    """A Runner of `num_blocks` blocks. Its tokens come from `table`, ids to choose from."""

    def __init__(
        self,
        times: StepTimes,
        clock: Clock,
        table: Sequence[int],
        *,
        num_blocks: int,
        block_size: int,
    ) -> None:
        self._times = times
        self._clock = clock
        self._table = table
        self._block_size = block_size
        #: The state after the token in each slot.
        self._states = array("Q", bytes(8)) * (num_blocks * block_size)
        self._ended_at = float("-inf")

    def execute(self, plan: StepPlan) -> StepResult:
        """See Runner.execute. Returns when the step's time has passed."""
        began = self._clock.now()
        if began - self._ended_at <= self._clock.slack:
            # From the last end, so that steps keep their pace and delays don't add up.
            began = self._ended_at
        chosen = [(item, state) for item, state in self._run(plan) if item.sample]
        result = StepResult([choose(state, self._table) for _, state in chosen])
        for at, (item, state) in enumerate(chosen):
            if (count := item.sampling.logprobs) is not None:
                result.logprobs[at] = pack([score(state, self._table, count)])
        self._ended_at = began + self._times.seconds(plan)
        self._clock.wait_until(self._ended_at)
        return result

    def _run(self, plan: StepPlan) -> list[tuple[ScheduledSequence, int]]:
        """Write all states; each sequence's last one."""
        states, size = self._states, self._block_size
        last = []
        for item in plan.scheduled:
            table, first = item.block_table, item.first_block
            before = item.start - 1
            state = (
                states[table[before // size - first] * size + before % size]
                if item.start
                else INITIAL_STATE
            )
            found = fold(state, item.token_ids)
            for position, state in enumerate(found, item.start):
                states[table[position // size - first] * size + position % size] = state
            last.append((item, state))
        return last
