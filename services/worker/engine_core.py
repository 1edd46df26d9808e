"""What all stepped engines share: sequences, scheduling, KV blocks, their events.

    core = EngineCore(info, runner, clock, max_step_tokens=512, max_sequences=64)
    core = EngineCore(…, kv_groups=group_layers(windows))    # of a model with windowed layers

`EngineCore` is the Engine protocol less loading. Each step it asks the scheduler
what to compute, makes a plan of that, has the runner execute it, and applies the
result. An engine composes it with a runner of its own. It knows no tensors, no
model and no clock but the one handed in.

Between steps, a sequence is in `_running` (it holds blocks) or in `_waiting` (it
holds none), and in `_sequences`; or it has ended.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from operator import attrgetter
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from services.worker.engine import EngineStats, StepOutput
from services.worker.kv import (
    BlockManager,
    KVGroup,
    TieredBlockManager,
    capacity,
    most_blocks,
    reach,
)
from services.worker.plan import NO_SCORES, BlockTable, ScheduledSequence, StepPlan, StepResult
from services.worker.scheduling import (
    DECODE_COST,
    PREFILL_COST,
    CachedPrefix,
    Groups,
    Snapshot,
    TenantCounters,
    WaitingQueue,
    schedule,
)
from services.worker.scheduling.sequence import SequenceState, fault
from services.worker.step_totals import StepTotals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from headrace.blocks import BlockId
    from services.worker.engine import EndReason, EngineInfo, SequenceEnd, SequenceRequest
    from services.worker.plan import Runner
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
        kv_groups: Sequence[KVGroup] = (KVGroup(()),),
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
        size, total = info.block_size, info.total_blocks
        self._windows = [group.window for group in kv_groups]
        self._has_windows = any(window is not None for window in self._windows)
        limits = [most_blocks(w, size, max_step_tokens) for w in self._windows if w is not None]
        self._groups = Groups(len(kv_groups) - len(limits), tuple(limits))
        self._max_len = min(info.context_len, capacity(kv_groups, total, size, max_step_tokens))
        self._blocks = _block_manager(info, self._windows)
        self._sequences: dict[int, SequenceState] = {}
        self._running: list[SequenceState] = []
        self._tenants = TenantCounters()
        self._waiting: WaitingQueue[SequenceState] = WaitingQueue(self._tenants)
        #: Ids of full blocks that running prefills will compute -> how many of them.
        self._coming: dict[BlockId, int] = {}
        #: Ends of what was refused or cancelled since the last step.
        self._ends: list[SequenceEnd] = []
        self._num_waiting_tokens = 0
        self._num_arrived = 0
        self._step = 0
        self._totals = StepTotals()

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        """See Engine.submit. Raises ValueError for the id of a sequence that has not ended."""
        now = self._clock()
        for request in requests:
            if request.sequence_id in self._sequences:
                raise ValueError(f"sequence {request.sequence_id} is here already")
            self._num_arrived += 1
            sequence, error = self._accept(request, now)
            if error:
                self._ends.append(sequence.end("error", now, error))
            elif request.generated_ids and (reason := sequence.ending()):
                self._ends.append(sequence.end(reason, now))
            else:
                self._sequences[sequence.sequence_id] = sequence
                self._tenants.enter(sequence.tenant)
                self._wait(sequence)

    def _accept(self, request: SequenceRequest, now: float) -> tuple[SequenceState, str]:
        """The sequence, and why it can never run here, or nothing."""
        sequence = SequenceState(request, self.info, self._max_len, self._num_arrived, now)
        return sequence, fault(request, self.info, self._max_len)

    def cancel(self, sequence_ids: Sequence[int]) -> None:
        """See Engine.cancel. Their blocks are free at once."""
        now = self._clock()
        for sequence_id in sequence_ids:
            sequence = self._sequences.get(sequence_id)
            if sequence is None:
                continue
            if sequence.tables:
                self._stop_running(sequence)
            else:
                self._unwait(sequence)
            self._finish(sequence, "cancelled", now, self._ends)

    def has_work(self) -> bool:
        """See Engine.has_work."""
        return bool(self._sequences or self._ends)

    def step(self) -> StepOutput:
        """See Engine.step."""
        started = self._clock()
        ends, self._ends = self._ends, []
        sequence_ids: list[int] = []
        token_ids: list[int] = []
        result = StepResult([])
        if self._sequences:
            decision = schedule(self._snapshot())
            scheduled, plan = self._apply(decision, started)
            result = self._runner.execute(plan)
            now = self._clock()
            self._totals.add(
                plan, len(decision.decodes), (now - started) * 1000 - result.transfer_ms
            )
            self._register(scheduled, plan)
            for sequence, token in _sampled(scheduled, plan, result):
                sequence_ids.append(sequence.sequence_id)
                token_ids.append(token)
                self._tenants.charge(sequence.tenant, DECODE_COST)
                if reason := sequence.append(token, now):
                    self._stop_running(sequence)
                    self._finish(sequence, reason, now, ends)
        self._step += 1
        stored, removed = self._blocks.take_changes()
        return StepOutput(
            self._step, sequence_ids, token_ids, ends, stored, removed, self.stats(),
            result.logprobs, result.prompt_logprobs, self._slower_changes(),
        )  # fmt: skip

    def _slower_changes(self) -> dict[str, tuple[list[int], list[int]]]:
        """For StepOutput.slower."""
        if not self.info.tier_blocks:
            return {}
        changes = self._blocks.take_slower_changes()
        return {
            tier: change
            for tier, change in zip(self.info.tiers[1:], changes, strict=True)
            if change[0] or change[1]
        }

    def stats(self) -> EngineStats:
        """See Engine.stats."""
        left = [item.num_tokens - item.num_computed for item in self._running]
        return EngineStats(
            active_sequences=len(self._running),
            queued_sequences=len(self._waiting),
            queued_prefill_tokens=self._num_waiting_tokens + sum(n for n in left if n > 1),
            used_blocks=self._blocks.num_used,
            total_blocks=self._blocks.num_blocks,
            **self._totals.as_dict(),
        )

    def owned_blocks(self) -> list[int]:
        """See Engine.owned_blocks."""
        return self._blocks.owned()

    def owned_slower(self) -> dict[str, list[int]]:
        """Short ids of all blocks in slower tiers, by tier."""
        return dict(zip(self.info.tiers[1:], self._blocks.owned_slower(), strict=True))

    def close(self) -> None:
        """See Engine.close. Drops the runner, and with it what that holds on the device."""
        self._runner = _Closed()

    def check(self) -> None:
        """Raise AssertionError if blocks or sequences are out of order. For tests."""
        self._blocks.check([table for item in self._running for table in item.tables])
        assert self._running == sorted(self._running, key=_ORDER)
        waiting = list(self._waiting)
        assert len(waiting) == len(self._waiting)
        for item in waiting:
            assert item.num_blocks == item.num_computed == item.num_registered == 0
        everything = {item.sequence_id: item for item in self._running + waiting}
        assert everything == self._sequences
        assert self._num_waiting_tokens == sum(item.num_tokens for item in waiting)
        for item in self._running:
            lengths = {a + len(b) for a, b in zip(item.firsts, item.tables, strict=True)}
            assert lengths == {item.num_blocks}
        coming = (self._coming_of(item) for item in self._running if item.is_prefilling)
        assert self._coming == Counter(block_id for ids in coming for block_id in ids)
        self._tenants.check(Counter(item.tenant for item in self._sequences.values()))

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
            groups=self._groups,
            coming=self._coming,
        )

    def _cached_prefix(self, item: Schedulable) -> CachedPrefix:
        sequence = self._sequences[item.sequence_id]
        ids = self._reusable_ids(sequence)
        if sequence.num_scored < sequence.num_prompt_tokens:
            # What is cached has no logits: the token before the next scored one is computed.
            ids = ids[: (sequence.num_scored - 1) // self.info.block_size]
        count, num_unused = self._blocks.look(ids)
        return CachedPrefix(count, num_unused, ids[count] if count < len(ids) else None)

    def _reusable_ids(self, sequence: SequenceState) -> list[BlockId]:
        # The last token is always computed: its logits choose the next one.
        return sequence.block_ids((sequence.num_tokens - 1) // self.info.block_size)

    def _num_exclusive_blocks(self, item: Schedulable) -> int:
        tables = self._sequences[item.sequence_id].tables
        return sum(self._blocks.num_exclusive(table) for table in tables)

    def _apply(self, decision: Decision, now: float) -> tuple[list[SequenceState], StepPlan]:
        """Move sequences and blocks as decided; what the runner has to compute for which."""
        known = self._sequences
        for sequence_id in decision.preempted:
            self._preempt(known[sequence_id])
        if decision.admissions:
            # All sharing before any allocation, which may evict what nobody uses.
            self._start([(known[item.sequence_id], item) for item in decision.admissions], now)
        scheduled, items = [], []
        for chunk in (*decision.decodes, *decision.prefills, *decision.admissions):
            sequence = known[chunk.sequence_id]
            if chunk.num_new_blocks:
                for table in sequence.tables:
                    table += self._blocks.allocate(chunk.num_new_blocks)
            scheduled.append(sequence)
            items.append(self._item(sequence, chunk.num_tokens))
        return scheduled, StepPlan(items, self._blocks.take_moves())

    def _item(self, sequence: SequenceState, num_tokens: int) -> ScheduledSequence:
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        tables = sequence.tables
        return ScheduledSequence(
            sequence.sequence_id,
            sequence.tokens[start:end],
            start,
            tables[0],
            end == sequence.num_tokens,
            sequence.request.sampling,
            sequence.firsts[0],
            tuple(map(BlockTable, sequence.firsts[1:], tables[1:])) if len(tables) > 1 else (),
            sequence.tokens,
            sequence.num_prompt_tokens,
            sequence.end_token_ids,
            sequence.to_score(start, end)
            if sequence.num_scored < sequence.num_prompt_tokens
            else NO_SCORES,
        )

    def _start(self, admitted: Sequence[tuple[SequenceState, Chunk]], now: float) -> None:
        prefixes = [
            self._reusable_ids(sequence)[: admission.num_cached_blocks]
            for sequence, admission in admitted
        ]
        taken = self._blocks.take_prefixes(prefixes)
        for (sequence, admission), tables in zip(admitted, taken, strict=True):
            self._start_one(sequence, admission.num_cached_blocks, tables, now)

    def _start_one(
        self, sequence: SequenceState, count: int, tables: list[list[int]], now: float
    ) -> None:
        self._unwait(sequence)
        insort(self._running, sequence, key=_ORDER)
        sequence.tables = tables
        sequence.firsts = [count - len(table) for table in tables]
        sequence.num_registered = count
        sequence.num_computed = count * self.info.block_size
        left = sequence.num_tokens - sequence.num_computed
        self._tenants.charge(sequence.tenant, left * PREFILL_COST)
        for block_id in self._coming_of(sequence):
            self._coming[block_id] = self._coming.get(block_id, 0) + 1
        if sequence.started_at is None:
            sequence.started_at = now
            sequence.cached_tokens = sequence.num_computed

    def _coming_of(self, sequence: SequenceState) -> list[BlockId]:
        """The full blocks that its prefill has not computed yet."""
        return self._reusable_ids(sequence)[sequence.num_registered :]

    def _preempt(self, sequence: SequenceState) -> None:
        self._stop_running(sequence)
        sequence.num_computed = 0
        sequence.num_registered = 0
        self._wait(sequence)

    def _register(self, scheduled: Iterable[SequenceState], plan: StepPlan) -> None:
        """Advance by what was computed, cache the blocks that became full, and give up
        those that the next token does not see."""
        block_size = self.info.block_size
        for sequence, item in zip(scheduled, plan.scheduled, strict=True):
            num_full = item.end // block_size
            if sequence.num_tokens - sequence.num_computed > 1:
                self._forget_coming(sequence, num_full)
            sequence.num_computed = item.end
            if item.scored:
                sequence.num_scored = item.scored.stop
            if num_full > sequence.num_registered:
                self._register_full(sequence, num_full)
            if self._has_windows:
                self._give_up(sequence)

    def _register_full(self, sequence: SequenceState, num_full: int) -> None:
        ids = sequence.block_ids(num_full)
        for group, table in enumerate(sequence.tables):
            start, first = sequence.num_registered, sequence.firsts[group]
            self._blocks.register(table[start - first : num_full - first], ids[start:], group)
        sequence.num_registered = num_full

    def _forget_coming(self, sequence: SequenceState, num_full: int | None = None) -> None:
        """Its blocks up to there (None: all) are computed, or will not be."""
        coming = self._coming
        for block_id in self._reusable_ids(sequence)[sequence.num_registered : num_full]:
            left = coming[block_id] - 1
            if left:
                coming[block_id] = left
            else:
                del coming[block_id]

    def _give_up(self, sequence: SequenceState) -> None:
        """Release the blocks that lie before the windows of the next token."""
        for group, window in enumerate(self._windows):
            if window is None:
                continue
            first = max(0, sequence.num_computed - window + 1) // self.info.block_size
            count = first - sequence.firsts[group]
            if count > 0:
                table = sequence.tables[group]
                self._blocks.release(table[:count])
                del table[:count]
                sequence.firsts[group] = first

    def _finish(
        self, sequence: SequenceState, reason: EndReason, now: float, ends: list[SequenceEnd]
    ) -> None:
        del self._sequences[sequence.sequence_id]
        self._tenants.leave(sequence.tenant)
        ends.append(sequence.end(reason, now))

    def _stop_running(self, sequence: SequenceState) -> None:
        del self._running[bisect_left(self._running, sequence.order, key=_ORDER)]
        if sequence.is_prefilling:
            self._forget_coming(sequence)
        for table in sequence.tables:
            self._blocks.release(table)
        sequence.tables = []
        sequence.firsts = []

    def _wait(self, sequence: SequenceState) -> None:
        self._waiting.add(sequence)
        self._num_waiting_tokens += sequence.num_tokens

    def _unwait(self, sequence: SequenceState) -> None:
        self._waiting.remove(sequence)
        self._num_waiting_tokens -= sequence.num_tokens


def _block_manager(info: EngineInfo, windows: Sequence[int | None]) -> BlockManager:
    if not info.tier_blocks:
        return BlockManager(info.total_blocks, [reach(w, info.block_size) for w in windows])
    if list(windows) != [None]:
        raise StartupError("slower KV tiers serve models without windowed layers only")
    return TieredBlockManager(info.total_blocks, info.tier_blocks)


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
