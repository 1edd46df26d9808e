"""A worker in virtual time: when its engine steps, and what then reaches others.

    idle ──submit──▶ between steps ──▶ stepping ──end of the step──▶ between steps
                          └── nothing to do ──▶ idle

What arrives during a step waits for its end, as in a real engine's process. A run of
steady steps (see `simulation_engine`) is cut after the step that something arrives in.
All times are in seconds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Protocol

from headrace.registry import DEVICE_TIER
from services.replay.simulation_engine import ReplayCore
from services.worker.engine import EngineInfo
from services.worker.engines.sim.clock import VirtualClock
from services.worker.engines.sim.tiers import Tiers, tiers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from services.replay.simulation import SimulationConfig
    from services.replay.simulation_calls import Call, Gaps
    from services.worker.engine import EngineStats, SequenceEnd, SequenceRequest, StepOutput
    from services.worker.engines.sim.timing import StepTiming

#: The longest sequence, if the KV cache does not say less.
_CONTEXT_LEN = 1 << 40


class Outside(Protocol):
    """What a worker tells, and by whom it is woken."""

    def at(self, time: float, call: Callable[[float], None]) -> None:
        """Call back, with the time, when it is `time`."""

    def on_first_token(self, call: Call, now: float) -> None:
        """A call got its first token."""

    def on_end(self, worker: SimulatedWorker, call: Call, end: SequenceEnd, now: float) -> None:
        """A call's sequence ended."""

    def on_blocks(
        self,
        worker: SimulatedWorker,
        stored: list[int],
        removed: list[int],
        now: float,
        tier: str = DEVICE_TIER,
    ) -> None:
        """A tier of the worker's prefix cache changed."""

    def on_load(self, worker: SimulatedWorker, stats: EngineStats, now: float) -> None:
        """The worker says what it does."""


class SimulatedWorker:
    """One generation of worker `number`."""

    def __init__(
        self,
        number: int,
        generation: int,
        config: SimulationConfig,
        timing: StepTiming,
        gaps: Gaps,
        outside: Outside,
        now: float,
    ) -> None:
        self.number = number
        self.generation = generation
        self.draining = False
        self.is_gone = False
        #: What it has been sent and has not ended, by number.
        self.calls: dict[int, Call] = {}
        self.num_steps = 0
        self.busy_s = 0.0
        self._clock = VirtualClock(now)
        self.core = ReplayCore(
            _info(config),
            timing,
            self._clock,
            max_step_tokens=config.max_step_tokens,
            max_sequences=config.max_sequences,
        )
        self._gaps = gaps
        self._outside = outside
        self._report_s = config.load_report_interval_ms / 1000
        self._next_report = now
        self._reports_later = False
        self._inbox: list[SequenceRequest] = []
        self._is_stepping = False
        self._output: StepOutput | None = None
        #: Ends of the planned steady steps.
        self._times: list[float] = []
        #: Steady steps that `calls` were not told of, and the end of the last step.
        self._untold = 0
        self._last_end = now
        #: Of the step or run in progress: what was planned before is void.
        self._version = 0

    def submit(self, call: Call, request: SequenceRequest, now: float) -> None:
        """A sequence arrives."""
        self.calls[call.number] = call
        self._inbox.append(request)
        if not self._is_stepping:
            self._begin(now)
            return
        # The run ends with the step that is under way now.
        last = bisect_left(self._times, now)
        if last + 1 < len(self._times):
            del self._times[last + 1 :]
            self._wake_at(self._times[-1])

    def fail(self, now: float) -> list[Call]:
        """It is gone at once, with the step under way. Returns the calls that it had."""
        self.is_gone = True
        self._version += 1
        if done := self._times[: bisect_right(self._times, now)]:
            self._commit(done)
        self._tell_steady()
        lost = list(self.calls.values())
        self.calls = {}
        return lost

    def _begin(self, now: float) -> None:
        """Between two steps."""
        self._clock.wait_until(now)
        if self._inbox:
            self._tell_steady()
            self.core.submit(self._inbox)
            self._inbox = []
        self._is_stepping = self.core.has_work()
        if not self._is_stepping:
            self._report_soon(now)
            return
        if self.core.is_steady:
            self._times = self.core.plan(max(self._next_report, now))
            if self._times:
                self._wake_at(self._times[-1])
                return
        self._tell_steady()
        self._last_end = now
        self._output = self.core.step()
        self._wake_at(self._clock.now())

    def _wake_at(self, time: float) -> None:
        self._version += 1
        version = self._version

        def wake(now: float) -> None:
            if version == self._version:
                self._end_step(now)

        self._outside.at(time, wake)

    def _end_step(self, now: float) -> None:
        output, self._output = self._output, None
        if output is not None:
            self.num_steps += 1
            self.busy_s += now - self._last_end
            self._last_end = now
            self._give(output.sequence_ids, now)
        else:
            output = self._commit(self._times)
        if output is not None:
            if output.stored or output.removed:
                self._outside.on_blocks(self, output.stored, output.removed, now)
            for tier, (stored, removed) in output.slower.items():
                self._outside.on_blocks(self, stored, removed, now, tier)
            for end in output.ends:
                call = self.calls.pop(end.sequence_id)
                call.generated = end.completion_tokens
                call.last_at = now
                self._outside.on_end(self, call, end, now)
        if self.is_gone:
            return
        if now >= self._next_report:
            self._report(now)
        self._begin(now)

    def _give(self, sequence_ids: Iterable[int], now: float) -> None:
        """Each of these got a token."""
        calls, gaps = self.calls, self._gaps
        for sequence_id in sequence_ids:
            call = calls[sequence_id]
            call.generated += 1
            if call.first_at is None:
                call.first_at = now
                self._outside.on_first_token(call, now)
            else:
                gaps.add(now - call.last_at, 1)
            call.last_at = now

    def _commit(self, times: Sequence[float]) -> StepOutput | None:
        """Steady steps have ended."""
        count = self.core.num_running
        output = self.core.commit(times)
        self.num_steps += len(times)
        self._untold += len(times)
        self.busy_s += times[-1] - self._last_end
        self._gaps.add_steps(self._last_end, times, count)
        self._last_end = times[-1]
        self._times = []
        return output

    def _tell_steady(self) -> None:
        """Count the steady steps' tokens for those that got them."""
        if self._untold:
            for sequence_id in self.core.running_ids():
                call = self.calls[sequence_id]
                call.generated += self._untold
                call.last_at = self._last_end
            self._untold = 0

    def _report_soon(self, now: float) -> None:
        """It has become idle: say so as soon as it may."""
        if now >= self._next_report:
            self._report(now)
        elif not self._reports_later:
            self._reports_later = True
            self._outside.at(self._next_report, self._report_late)

    def _report_late(self, now: float) -> None:
        self._reports_later = False
        if not self.is_gone and now >= self._next_report:
            self._report(now)

    def _report(self, now: float) -> None:
        self._next_report = now + self._report_s
        self._outside.on_load(self, self.core.stats(), now)


def slower_tiers(config: SimulationConfig) -> Tiers:
    """The tiers of each worker."""
    return tiers(
        config.block_size * config.kv_bytes_per_token,
        host=(config.host_blocks, config.host_gbps),
        disk=(config.disk_blocks, config.disk_gbps),
    )


def _info(config: SimulationConfig) -> EngineInfo:
    slower = slower_tiers(config)
    return EngineInfo(
        engine="sim",
        model_revision="replay",
        tokenizer_digest="",
        vocab_size=1 << 32,
        context_len=_CONTEXT_LEN,
        block_size=config.block_size,
        total_blocks=config.num_blocks,
        max_sequences=config.max_sequences,
        eos_token_ids=(),
        resume="exact",
        tiers=slower.names,
        tier_blocks=slower.blocks,
        tier_ms_per_block=slower.ms_per_block,
    )
