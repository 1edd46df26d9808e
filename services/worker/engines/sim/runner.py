"""Executes plans without arithmetic: takes the time a model would, and chooses tokens.

It keeps one number per KV slot (see `tokens`), and reads the past only through a
plan's block table, as a real runner does.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from headrace.logprobs import pack
from services.worker.engines.sim.timing import StepWork
from services.worker.engines.sim.tokens import INITIAL_STATE, choose, fold, score
from services.worker.plan import DEVICE, StepResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engines.sim.clock import Clock
    from services.worker.engines.sim.timing import StepTiming
    from services.worker.plan import ScheduledSequence, StepPlan


def work_of(plan: StepPlan, capacity_tokens: int) -> StepWork:
    """What executing `plan` is, over a KV cache of so many tokens, for a timing model."""
    num_decodes = decode_tokens = 0
    prefills = []
    for item in plan.scheduled:
        count = len(item.token_ids)
        if count == 1:
            num_decodes += 1
            decode_tokens += item.start + 1
        else:
            prefills.append((count, item.start))
    return StepWork(num_decodes, decode_tokens, prefills, capacity_tokens)


def transfer_ms(plan: StepPlan, tier_ms_per_block: Sequence[float]) -> float:
    """What bringing a plan's blocks to the device takes. Writing them to slower tiers
    goes on beside the computing and takes nothing."""
    total = 0.0
    for move in plan.moves:
        if move.target_tier == DEVICE:
            total += tier_ms_per_block[move.source_tier]
    return total


class SimRunner:
    """A Runner of `num_blocks` blocks, `tier_blocks` of slower tiers beside them. Its
    tokens come from `table`, ids to choose from. A step waits for what it brings."""

    def __init__(
        self,
        timing: StepTiming,
        clock: Clock,
        table: Sequence[int],
        *,
        num_blocks: int,
        block_size: int,
        tier_blocks: Sequence[int] = (),
        tier_ms_per_block: Sequence[float] = (),
    ) -> None:
        self._timing = timing
        self._capacity_tokens = num_blocks * block_size
        self._clock = clock
        self._table = table
        self._block_size = block_size
        #: The state after the token in each slot.
        self._states = array("Q", bytes(8)) * (num_blocks * block_size)
        #: By tier, the device's first.
        self._tiers = [
            self._states,
            *(array("Q", bytes(8)) * (count * block_size) for count in tier_blocks),
        ]
        self._tier_ms_per_block = tier_ms_per_block
        self._ended_at = float("-inf")

    def execute(self, plan: StepPlan) -> StepResult:
        """See Runner.execute. Returns when the step's time has passed."""
        began = self._clock.now()
        if began - self._ended_at <= self._clock.slack:
            # From the last end, so that steps keep their pace and delays don't add up.
            began = self._ended_at
        self._move(plan)
        chosen = [(item, state) for item, state in self._run(plan) if item.sample]
        brought_ms = transfer_ms(plan, self._tier_ms_per_block)
        tokens = [choose(state, self._table) for _, state in chosen]
        result = StepResult(tokens, transfer_ms=brought_ms)
        for at, (item, state) in enumerate(chosen):
            if (count := item.sampling.logprobs) is not None:
                result.logprobs[at] = pack([score(state, self._table, count)])
        taken_ms = self._timing.milliseconds(work_of(plan, self._capacity_tokens)) + brought_ms
        self._ended_at = began + taken_ms / 1000
        self._clock.wait_until(self._ended_at)
        return result

    def _move(self, plan: StepPlan) -> None:
        size, tiers = self._block_size, self._tiers
        for tier, source, target_tier, target in plan.moves:
            content = tiers[tier][source * size : (source + 1) * size]
            tiers[target_tier][target * size : (target + 1) * size] = content

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
