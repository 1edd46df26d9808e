"""A worker's engine in virtual time: the real core, which hurries where nothing changes.

`ReplayCore` is `EngineCore` over a timing model. While every running sequence decodes
and none can be admitted, it is *steady*: a step gives each its token, and all that
can happen is that a sequence needs a block, fills one, or ends. When, is known from
its length. So in a steady stretch nothing is done to sequences at steps in which
nothing happens to them:

    step of the stretch     0   1   2   3   4   5   6
    sequence a                      f   b                 f: fills a block, b: needs one
    sequence b              f   b               e         e: ends
    planned runs           [0] [1] [2] [3] [4   5]  …     a run ends with what happens

`plan` gives the times at which the steps of a run end and changes nothing; `commit`
makes some of them true. Between steps, outputs, times, blocks, events and totals are
the same, to the bit, as `EngineCore`'s own `step` makes them.
"""

from __future__ import annotations

from collections import defaultdict
from heapq import heappop, heappush
from operator import attrgetter
from typing import TYPE_CHECKING, cast

from services.worker.engine import EngineStats, StepOutput
from services.worker.engine_core import EngineCore
from services.worker.engines.sim.runner import transfer_ms, work_of
from services.worker.engines.sim.timing import StepWork
from services.worker.plan import StepResult
from services.worker.scheduling import DECODE_COST
from services.worker.scheduling.sequence import SequenceState, length_fault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace.blocks import BlockId
    from services.replay.simulation_content import Content, Tokens
    from services.worker.engine import EndReason, EngineInfo, SequenceEnd, SequenceRequest
    from services.worker.engines.sim.clock import VirtualClock
    from services.worker.engines.sim.timing import StepTiming
    from services.worker.plan import StepPlan
    from services.worker.scheduling import Decision

_ORDER = attrgetter("order")


class ReplaySequence(SequenceState):
    """A sequence whose tokens are not kept: block ids come from the trace's content."""

    __slots__ = ("content",)

    def __init__(
        self,
        request: SequenceRequest,
        info: EngineInfo,
        max_len: int,
        arrival: int,
        submitted_at: float,
    ) -> None:
        super().__init__(request, info, max_len, arrival, submitted_at)
        self.content: Content = cast("Tokens", request.prompt_ids).content

    def block_ids(self, count: int) -> list[BlockId]:
        """See SequenceState."""
        return self.content.block_ids(count)

    def append(self, token: int, now: float) -> EndReason | None:
        """See SequenceState."""
        self.num_tokens += 1
        if self.first_token_at is None:
            self.first_token_at = now
        return self.ending()

    def ending(self) -> EndReason | None:
        """See SequenceState. Nothing but length ends it."""
        return None if self.num_left > 0 else "length"

    def skip(self, count: int) -> None:
        """It decoded `count` tokens."""
        self.num_tokens += count
        self.num_computed += count


class TimedRunner:
    """A Runner that takes time and nothing else: all its tokens are 0."""

    def __init__(self, timing: StepTiming, clock: VirtualClock, info: EngineInfo) -> None:
        self._timing = timing
        self._clock = clock
        self._capacity_tokens = info.total_blocks * info.block_size
        self._tier_ms_per_block = info.tier_ms_per_block

    def execute(self, plan: StepPlan) -> StepResult:
        """See Runner.execute."""
        taken_ms = self._timing.milliseconds(work_of(plan, self._capacity_tokens))
        brought_ms = transfer_ms(plan, self._tier_ms_per_block)
        self._clock.wait_until(self._clock.now() + (taken_ms + brought_ms) / 1000)
        tokens = [0] * sum(item.sample for item in plan.scheduled)
        return StepResult(tokens, transfer_ms=brought_ms)


class ReplayCore(EngineCore):
    """See the module's docstring. Its sequences' `prompt_ids` are `Tokens`."""

    def __init__(
        self,
        info: EngineInfo,
        timing: StepTiming,
        clock: VirtualClock,
        *,
        max_step_tokens: int,
        max_sequences: int,
    ) -> None:
        self._capacity_tokens = info.total_blocks * info.block_size
        runner = TimedRunner(timing, clock, info)
        super().__init__(
            info,
            runner,
            clock.now,
            max_step_tokens=max_step_tokens,
            max_sequences=max_sequences,
        )
        self._timing = timing
        self._virtual = clock
        #: None unless in a steady stretch.
        self._steady: _Stretch | None = None
        #: Of the last step.
        self._only_decoded = False
        self.num_preemptions = 0

    @property
    def is_steady(self) -> bool:
        """Whether `plan` and `commit` may be called."""
        return self._steady is not None

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    def running_ids(self) -> list[int]:
        """Their ids."""
        return [sequence.sequence_id for sequence in self._running]

    def submit(self, requests: list[SequenceRequest]) -> None:  # type: ignore[override]
        """See Engine.submit."""
        self._settle()
        super().submit(requests)

    def cancel(self, sequence_ids: list[int]) -> None:  # type: ignore[override]
        """See Engine.cancel."""
        self._settle()
        super().cancel(sequence_ids)

    def step(self) -> StepOutput:
        """See Engine.step."""
        self._settle()
        output = super().step()
        # Each that runs must have got a token: one may have a single token left to prefill.
        if self._running and len(output.sequence_ids) - len(output.ends) >= len(self._running):
            self._try_steady(output)
        return output

    def plan(self, stop: float) -> list[float]:
        """When the next steps end: at least one, and none begins at or after `stop`.

        All but the last change nothing but lengths. Empty if the stretch is over.
        """
        stretch = self._steady
        assert stretch is not None
        action = stretch.next_action()
        last = action + 1
        if action in stretch.allocations:
            needed = sum(1 for item in stretch.allocations[action] if item.tables)
            if needed > self._blocks.num_available:
                last = action
        count, tokens, capacity = len(self._running), stretch.num_tokens, self._capacity_tokens
        milliseconds = self._timing.milliseconds
        now, times = self._clock(), []
        for _ in range(stretch.step, last):
            now += milliseconds(StepWork(count, tokens, (), capacity)) / 1000
            times.append(now)
            tokens += count
            if now >= stop:
                break
        if not times:
            self._settle()
        return times

    def commit(self, times: Sequence[float]) -> StepOutput | None:
        """Take the steps that `plan` said end at `times`, or the first of them.

        The output is that of the last of them, without tokens: every running
        sequence got one in each. None if nothing else came of it.
        """
        stretch = self._steady
        assert stretch is not None
        action = stretch.next_action()
        now, count = times[-1], len(self._running)
        self._totals.add_decode_steps(count, stretch.num_tokens, self._clock(), times)
        stretch.num_tokens += count * len(times)
        stretch.step += len(times)
        self._step += len(times)
        if stretch.step <= action:
            self._virtual.wait_until(now)
            return None
        ends: list[SequenceEnd] = []
        self._act(stretch, action, now, ends)
        stored, removed = self._blocks.take_changes()
        slower = self._slower_changes()
        return StepOutput(self._step, ends=ends, stored=stored, removed=removed, slower=slower)

    def stats(self) -> EngineStats:
        """See Engine.stats."""
        if self._steady is None:
            return super().stats()
        # Nobody prefills.
        blocks = self._blocks
        return EngineStats(
            len(self._running), len(self._waiting), self._num_waiting_tokens,
            blocks.num_used, blocks.num_blocks, **self._totals.as_dict(),
        )  # fmt: skip

    def _act(self, stretch: _Stretch, step: int, now: float, ends: list[SequenceEnd]) -> None:
        """What happens in one step of the stretch, in the order in which a step does it."""
        for sequence in _alive(stretch.allocations, step):
            sequence.tables[0] += self._blocks.allocate(1)
        self._virtual.wait_until(now)
        size = self.info.block_size
        is_over = False
        for sequence in _alive(stretch.fills, step):
            num_full = sequence.num_registered + 1
            self._register_full(sequence, num_full)
            is_over |= sequence.block_ids(num_full)[-1] in stretch.head_ids
            stretch.add(stretch.allocations, step + 1, sequence)
            stretch.add(stretch.fills, step + size, sequence)
        for sequence in _alive(stretch.ends, step):
            stretch.num_tokens -= sequence.num_tokens + stretch.step
            self._skip(sequence, stretch.step)
            self._stop_running(sequence)
            self._finish(sequence, "length", now, ends)
        if is_over or not self._running or (ends and len(self._waiting)):
            self._settle()

    def _apply(self, decision: Decision, now: float) -> tuple[list[SequenceState], StepPlan]:
        self._only_decoded = not (decision.preempted or decision.prefills or decision.admissions)
        self.num_preemptions += len(decision.preempted)
        return super()._apply(decision, now)

    def _accept(self, request: SequenceRequest, now: float) -> tuple[SequenceState, str]:
        sequence = ReplaySequence(request, self.info, self._max_len, self._num_arrived, now)
        error = length_fault(
            sequence.num_prompt_tokens, sequence.num_tokens, self.info, self._max_len
        )
        return sequence, error

    def _skip(self, sequence: SequenceState, count: int) -> None:
        cast("ReplaySequence", sequence).skip(count)
        self._tenants.charge(sequence.tenant, count * DECODE_COST)

    def _settle(self) -> None:
        """End the stretch: give all sequences the lengths that they have by now."""
        stretch, self._steady = self._steady, None
        if stretch is not None and stretch.step:
            for sequence in self._running:
                self._skip(sequence, stretch.step)

    def _try_steady(self, output: StepOutput) -> None:
        """Begin a stretch if, after this step, nothing but decoding can come."""
        if self._ends or any(item.num_tokens - item.num_computed > 1 for item in self._running):
            return
        head_ids: frozenset[BlockId] = frozenset()
        if len(self._waiting) and len(self._running) < self._max_sequences:
            # The step looked at the first that waits, in vain; and so it will stay,
            # unless a block of its prompt turns up.
            if output.ends or not self._only_decoded or not self._waiting.is_head_fixed:
                return
            head = next(iter(self._waiting))
            head_ids = frozenset(self._reusable_ids(head))
        self._steady = _Stretch(self._running, self.info.block_size, head_ids)


class _Stretch:
    """When something happens to whom, by the number of the step in the stretch."""

    def __init__(
        self, running: list[SequenceState], block_size: int, head_ids: frozenset[BlockId]
    ) -> None:
        self.step = 0
        self.head_ids = head_ids
        #: What the attention of the next step reads.
        self.num_tokens = 0
        self.allocations: dict[int, list[SequenceState]] = defaultdict(list)
        self.fills: dict[int, list[SequenceState]] = defaultdict(list)
        self.ends: dict[int, list[SequenceState]] = defaultdict(list)
        self._steps: list[int] = []
        for sequence in running:
            computed = sequence.num_computed
            self.num_tokens += sequence.num_tokens
            # Later blocks are needed when the ones before them are full.
            if not computed % block_size:
                self.add(self.allocations, 0, sequence)
            self.add(self.fills, -(computed + 1) % block_size, sequence)
            self.add(self.ends, sequence.num_left - 1, sequence)

    def add(self, kind: dict[int, list[SequenceState]], step: int, item: SequenceState) -> None:
        """Note what happens to a sequence."""
        kind[step].append(item)
        heappush(self._steps, step)

    def next_action(self) -> int:
        """The next step in which something happens."""
        while self._steps[0] < self.step:
            heappop(self._steps)
        return self._steps[0]


def _alive(kind: dict[int, list[SequenceState]], step: int) -> list[SequenceState]:
    """To whom something happens in this step, in order; those that ended have no tables."""
    found = [sequence for sequence in kind.pop(step, ()) if sequence.tables]
    found.sort(key=_ORDER)
    return found
