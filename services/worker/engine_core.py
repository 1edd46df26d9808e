"""What all stepped engines share: sequences, scheduling, KV blocks, their events.

    core = EngineCore(info, runner, clock, max_step_tokens=512, max_sequences=64)

`EngineCore` is the Engine protocol less loading. Each step it asks the scheduler
what to compute, makes a plan of that, has the runner execute it, and applies the
result. An engine composes it with a runner of its own. It knows no tensors, no
model and no clock but the one handed in.

Between steps, a sequence is in `_running` (it holds blocks) or in `_waiting` (it
holds none), both in the scheduler's order, and in `_sequences`; or it has ended.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from services.worker.engine import EngineStats, StepOutput
from services.worker.kv import BlockManager
from services.worker.plan import ScheduledSequence, StepPlan
from services.worker.scheduling import CachedPrefix, Snapshot, blocks_for, schedule
from services.worker.scheduling.sequence import SequenceState, fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from services.worker.engine import EndReason, EngineInfo, SequenceEnd, SequenceRequest
    from services.worker.plan import Runner, StepResult
    from services.worker.scheduling import Chunk, Decision, Schedulable

_ORDER = attrgetter("order")


class EngineCore:
    """Sequences, scheduler and blocks around one runner. Not thread-safe.

    `clock` gives seconds and never goes back. All `info.total_blocks` physical
    blocks, numbered from 0, are the runner's. Raises StartupError for limits that
    can't work.
    """

    def __init__(
        self,
        info: EngineInfo,
        runner: Runner,
        clock: Callable[[], float],
        *,
        max_step_tokens: int,
        max_sequences: int,
    ) -> None:
        if max_sequences < 1:
            raise StartupError(f"max_sequences must be 1 or more, not {max_sequences}")
        if max_step_tokens < max_sequences:
            raise StartupError(
                f"max_step_tokens must be at least max_sequences ({max_sequences}), "
                f"not {max_step_tokens}: each running sequence decodes a token per step"
            )
        self.info = info
        self._runner = runner
        self._clock = clock
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self._blocks = BlockManager(info.total_blocks)
        self._sequences: dict[int, SequenceState] = {}
        self._running: list[SequenceState] = []
        self._waiting: list[SequenceState] = []
        #: Ends of what was refused or cancelled since the last step.
        self._ends: list[SequenceEnd] = []
        self._num_waiting_tokens = 0
        self._num_arrived = 0
        self._step = 0
        self._prefill_tokens, self._prefill_ms = 0, 0.0
        self._decode_steps, self._decode_ms = 0, 0.0

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        """See Engine.submit. Raises ValueError for the id of a sequence that has not ended."""
        now = self._clock()
        for request in requests:
            if request.sequence_id in self._sequences:
                raise ValueError(f"sequence {request.sequence_id} is here already")
            self._num_arrived += 1
            sequence = SequenceState(request, self.info, self._num_arrived, now)
            if error := fault(request, self.info):
                self._ends.append(sequence.end("error", now, error))
            elif request.generated_ids and (reason := sequence.ending()):
                self._ends.append(sequence.end(reason, now))
            else:
                self._sequences[sequence.sequence_id] = sequence
                self._wait(sequence)

    def cancel(self, sequence_ids: Sequence[int]) -> None:
        """See Engine.cancel. Their blocks are free at once."""
        now = self._clock()
        for sequence_id in sequence_ids:
            sequence = self._sequences.get(sequence_id)
            if sequence is None:
                continue
            if sequence.block_table:
                self._finish(sequence, "cancelled", now, self._ends)
            else:
                self._unwait(sequence)
                del self._sequences[sequence_id]
                self._ends.append(sequence.end("cancelled", now))

    def has_work(self) -> bool:
        """See Engine.has_work."""
        return bool(self._sequences or self._ends)

    def step(self) -> StepOutput:
        """See Engine.step."""
        started = self._clock()
        ends, self._ends = self._ends, []
        sequence_ids: list[int] = []
        token_ids: list[int] = []
        if self._sequences:
            decision = schedule(self._snapshot())
            scheduled, plan = self._apply(decision, started)
            result = self._runner.execute(plan)
            now = self._clock()
            self._count(decision, plan, (now - started) * 1000)
            self._register(scheduled, plan)
            for sequence, token in _sampled(scheduled, plan, result):
                sequence_ids.append(sequence.sequence_id)
                token_ids.append(token)
                if reason := sequence.append(token, now):
                    self._finish(sequence, reason, now, ends)
        self._step += 1
        stored, removed = self._blocks.take_changes()
        return StepOutput(self._step, sequence_ids, token_ids, ends, stored, removed, self.stats())

    def stats(self) -> EngineStats:
        """See Engine.stats."""
        left = [item.num_tokens - item.num_computed for item in self._running]
        return EngineStats(
            active_sequences=len(self._running),
            queued_sequences=len(self._waiting),
            queued_prefill_tokens=self._num_waiting_tokens + sum(n for n in left if n > 1),
            used_blocks=self._blocks.num_used,
            total_blocks=self._blocks.num_blocks,
            prefill_tokens=self._prefill_tokens,
            prefill_ms=self._prefill_ms,
            decode_steps=self._decode_steps,
            decode_ms=self._decode_ms,
        )

    def owned_blocks(self) -> list[int]:
        """See Engine.owned_blocks."""
        return self._blocks.owned()

    def close(self) -> None:
        """See Engine.close. Drops the runner, and with it what that holds on the device."""
        self._runner = _Closed()

    def check(self) -> None:
        """Raise AssertionError if blocks or sequences are out of order. For tests."""
        self._blocks.check([item.block_table for item in self._running])
        for queue in (self._running, self._waiting):
            assert queue == sorted(queue, key=_ORDER)
        for item in self._waiting:
            assert item.num_blocks == item.num_computed == item.num_registered == 0
        everything = {item.sequence_id: item for item in self._running + self._waiting}
        assert everything == self._sequences
        assert self._num_waiting_tokens == sum(item.num_tokens for item in self._waiting)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            running=self._running,
            waiting=self._waiting,
            num_available_blocks=self._blocks.num_available,
            block_size=self.info.block_size,
            max_step_tokens=self._max_step_tokens,
            max_sequences=self._max_sequences,
            cached_prefix=self._cached_prefix,
            num_exclusive_blocks=self._num_exclusive_blocks,
        )

    def _cached_prefix(self, item: Schedulable) -> CachedPrefix:
        found = self._find_prefix(self._sequences[item.sequence_id])
        return CachedPrefix(len(found), self._blocks.num_unused(found))

    def _find_prefix(self, sequence: SequenceState) -> list[int]:
        # The last token is always computed: its logits choose the next one.
        reusable = (sequence.num_tokens - 1) // self.info.block_size
        return self._blocks.find_prefix(sequence.block_ids(reusable))

    def _num_exclusive_blocks(self, item: Schedulable) -> int:
        return self._blocks.num_exclusive(self._sequences[item.sequence_id].block_table)

    def _apply(self, decision: Decision, now: float) -> tuple[list[SequenceState], StepPlan]:
        """Move sequences and blocks as decided; what the runner has to compute for which."""
        known = self._sequences
        for sequence_id in decision.preempted:
            self._preempt(known[sequence_id])
        # All sharing before any allocation, which may evict what nobody uses.
        for admission in decision.admissions:
            self._start(known[admission.sequence_id], admission, now)
        scheduled, items = [], []
        for chunk in (*decision.decodes, *decision.prefills, *decision.admissions):
            sequence = known[chunk.sequence_id]
            if chunk.num_new_blocks:
                sequence.block_table += self._blocks.allocate(chunk.num_new_blocks)
            scheduled.append(sequence)
            items.append(self._item(sequence, chunk.num_tokens))
        return scheduled, StepPlan(items)

    def _item(self, sequence: SequenceState, num_tokens: int) -> ScheduledSequence:
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        is_last = end == sequence.num_tokens
        table = sequence.block_table
        return ScheduledSequence(
            sequence.sequence_id,
            sequence.tokens[start:end],
            start,
            table if is_last else table[: blocks_for(end, self.info.block_size)],
            is_last,
            sequence.request.sampling,
        )

    def _start(self, sequence: SequenceState, admission: Chunk, now: float) -> None:
        self._unwait(sequence)
        insort(self._running, sequence, key=_ORDER)
        shared = self._find_prefix(sequence)[: admission.num_cached_blocks]
        self._blocks.share(shared)
        sequence.block_table = shared
        sequence.num_registered = len(shared)
        sequence.num_computed = len(shared) * self.info.block_size
        if sequence.started_at is None:
            sequence.started_at = now
            sequence.cached_tokens = sequence.num_computed

    def _preempt(self, sequence: SequenceState) -> None:
        self._stop_running(sequence)
        sequence.num_computed = 0
        sequence.num_registered = 0
        self._wait(sequence)

    def _register(self, scheduled: Iterable[SequenceState], plan: StepPlan) -> None:
        """Advance by what was computed, and cache the blocks that became full."""
        block_size = self.info.block_size
        for sequence, item in zip(scheduled, plan.scheduled, strict=True):
            sequence.num_computed = end = item.end
            num_full = end // block_size
            if num_full == sequence.num_registered:
                continue
            ids = sequence.block_ids(num_full)
            for index in range(sequence.num_registered, num_full):
                self._blocks.register(sequence.block_table[index], ids[index])
            sequence.num_registered = num_full

    def _finish(
        self, sequence: SequenceState, reason: EndReason, now: float, ends: list[SequenceEnd]
    ) -> None:
        self._stop_running(sequence)
        del self._sequences[sequence.sequence_id]
        ends.append(sequence.end(reason, now))

    def _stop_running(self, sequence: SequenceState) -> None:
        del self._running[bisect_left(self._running, sequence.order, key=_ORDER)]
        self._blocks.release(sequence.block_table)
        sequence.block_table = []

    def _wait(self, sequence: SequenceState) -> None:
        insort(self._waiting, sequence, key=_ORDER)
        self._num_waiting_tokens += sequence.num_tokens

    def _unwait(self, sequence: SequenceState) -> None:
        del self._waiting[bisect_left(self._waiting, sequence.order, key=_ORDER)]
        self._num_waiting_tokens -= sequence.num_tokens

    def _count(self, decision: Decision, plan: StepPlan, elapsed_ms: float) -> None:
        """Only pure steps count: mixed ones would blur what a prefilled token costs."""
        num_prefills = len(decision.prefills) + len(decision.admissions)
        if decision.decodes and not num_prefills:
            self._decode_steps += 1
            self._decode_ms += elapsed_ms
        elif num_prefills and not decision.decodes:
            self._prefill_tokens += plan.num_tokens
            self._prefill_ms += elapsed_ms


class _Closed:
    def execute(self, plan: StepPlan) -> StepResult:
        raise RuntimeError("the engine is closed")


def _sampled(
    scheduled: Iterable[SequenceState], plan: StepPlan, result: StepResult
) -> Iterable[tuple[SequenceState, int]]:
    asked = (
        sequence for sequence, item in zip(scheduled, plan.scheduled, strict=True) if item.sample
    )
    return zip(asked, result.token_ids, strict=True)
