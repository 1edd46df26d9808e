"""The sequences that live in the engine, and the way of their tokens out.

`Sequences` admits submissions, names them by a number, and deals each step's
tokens to the outlets that want them in one pass: no task, queue, future or event
is touched per token. Every submission gets exactly one `End`, unless its outlet
has dropped it.

It knows outlets (a gateway's session, a single call) but no transport.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from headrace import telemetry
from headrace.errors import DeadlineExceeded, HeadraceError, InvalidArgument
from headrace.logprobs import record_len
from headrace.rpc.errors import from_exception
from services.worker import admission, tracing
from services.worker.engine import EndReason
from services.worker.engine_wire import Submit

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable

    from services.worker.admission import Submission
    from services.worker.engine import EngineInfo, SequenceEnd, StepOutput

log = logging.getLogger("headrace.worker")

#: Bytes of a prompt's log probabilities, whole records, that are passed on at a time.
_PROMPT_SCORES_LEN = 16 << 10


@dataclass(frozen=True, slots=True)
class End:
    """The last of a sequence, for its outlet. `error` is set when `reason` is "error"."""

    slot: int
    reason: EndReason
    error: HeadraceError | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    stopped_by_token: bool = False


class Outlet(Protocol):
    """Where sequences' output goes. Called from the engine's read callback: never raises."""

    #: New tokens, in order: the sequence slots[i] got tokens[i]. Appended to here.
    slots: array[int]
    tokens: array[int]

    def score(self, slot: int, data: bytes, *, prompt: bool) -> None:
        """Log probabilities (see headrace.logprobs) of the token of `slot` that comes next,
        or of the next tokens of its prompt: whole records, far fewer than fill a frame.
        Only for sequences that asked."""

    def end(self, end: End) -> None:
        """A sequence ended; all its tokens are in `tokens` already."""

    def flush(self) -> None:
        """A step's worth is complete: pass it on."""


class EngineHandle(Protocol):
    """What is asked of the engine here."""

    def submit(self, request: Submit) -> None:
        """Queue a sequence."""

    def cancel(self, sequence_ids: list[int]) -> None:
        """Stop sequences."""


class _Live:
    """One sequence in the engine."""

    __slots__ = ("outlet", "slot", "started_ns", "submission", "timer")

    def __init__(self, submission: Submission, outlet: Outlet) -> None:
        self.slot = submission.slot
        self.outlet = outlet
        self.submission = submission
        self.started_ns = time.time_ns()
        self.timer: asyncio.TimerHandle | None = None


class Sequences:
    """All live sequences of one worker."""

    def __init__(
        self, engine: EngineHandle, info: EngineInfo, *, max_queued: int, worker_id: str
    ) -> None:
        self.draining = False
        #: Set while nothing lives.
        self.idle = asyncio.Event()
        self.idle.set()
        self._worker_id = worker_id
        self._engine = engine
        self._info = info
        self._max_queued = max_queued
        self._last_id = 0
        self._live: dict[int, _Live] = {}

    def __len__(self) -> int:
        return len(self._live)

    def submit(self, submission: Submission, outlet: Outlet) -> int:
        """Admit a sequence and return its number, never given twice.

        Returns 0 if it was refused: the outlet has its end. The caller flushes it.
        """
        try:
            admission.check_capacity(
                len(self._live), self._info, self._max_queued, draining=self.draining
            )
            submission = admission.check(submission, self._info)
        except Exception as error:  # noqa: BLE001 - becomes the sequence's error
            outlet.end(_failed(submission, from_exception(error)))
            return 0
        self._last_id += 1
        live = _Live(submission, outlet)
        self._live[self._last_id] = live
        self.idle.clear()
        if submission.timeout_ms:
            live.timer = asyncio.get_running_loop().call_later(
                submission.timeout_ms / 1000, self._time_out, self._last_id
            )
        self._engine.submit(
            Submit(
                sequence_id=self._last_id,
                prompt_ids=submission.prompt_ids,
                generated_ids=submission.generated_ids,
                sampling=submission.sampling,
                namespace_key=submission.namespace_key,
                priority=submission.priority,
                tenant=submission.tenant,
                timeout_ms=submission.timeout_ms,
            )
        )
        return self._last_id

    def cancel(self, sequence_id: int) -> None:
        """Stop a sequence; the engine's next step brings its end."""
        if sequence_id in self._live:
            self._engine.cancel([sequence_id])

    def fail(self, sequence_id: int, error: HeadraceError) -> None:
        """Stop a sequence and end it with `error` now. The caller flushes its outlet."""
        live = self._pop(sequence_id)
        if live is not None:
            self._engine.cancel([sequence_id])
            self._end(live, _failed(live.submission, error))

    def drop(self, sequence_ids: Iterable[int]) -> None:
        """Stop sequences whose outlet is gone: nothing more is heard of them."""
        dropped = [number for number in sequence_ids if self._pop(number) is not None]
        if dropped:
            self._engine.cancel(dropped)

    def on_step(self, output: StepOutput) -> None:
        """Deal a step's tokens and ends."""
        live = self._live
        touched: set[Outlet] = set()
        if output.prompt_logprobs:
            self._score_prompts(output, touched)
        scores = output.logprobs
        for at, sequence_id in enumerate(output.sequence_ids):
            sequence = live.get(sequence_id)
            if sequence is not None:
                outlet = sequence.outlet
                if scores and at in scores:
                    outlet.score(sequence.slot, scores[at], prompt=False)
                outlet.slots.append(sequence.slot)
                outlet.tokens.append(output.token_ids[at])
                touched.add(outlet)
        for end in output.ends:
            sequence = self._pop(end.sequence_id)
            if sequence is not None:
                self._end(sequence, _engine_end(sequence.slot, end))
                touched.add(sequence.outlet)
        for outlet in touched:
            outlet.flush()

    def _score_prompts(self, output: StepOutput, touched: set[Outlet]) -> None:
        for sequence_id, data in output.prompt_logprobs.items():
            sequence = self._live.get(sequence_id)
            if sequence is not None:
                length = record_len(sequence.submission.sampling.prompt_logprobs or 0)
                piece = _PROMPT_SCORES_LEN // length * length
                for start in range(0, len(data), piece):
                    sequence.outlet.score(sequence.slot, data[start : start + piece], prompt=True)
                touched.add(sequence.outlet)

    def _pop(self, sequence_id: int) -> _Live | None:
        live = self._live.pop(sequence_id, None)
        if live is not None and live.timer is not None:
            live.timer.cancel()
        if not self._live:
            self.idle.set()
        return live

    def _end(self, live: _Live, end: End) -> None:
        live.outlet.end(end)
        if telemetry.is_enabled():
            tracing.record(
                live.submission, end, live.started_ns, self._worker_id, self._info.engine
            )

    def _time_out(self, sequence_id: int) -> None:
        live = self._live.get(sequence_id)
        if live is not None:
            limit = live.submission.timeout_ms
            self.fail(sequence_id, DeadlineExceeded(f"not finished within {limit} ms"))
            live.outlet.flush()


def _failed(submission: Submission, error: HeadraceError) -> End:
    return End(
        submission.slot,
        "error",
        error,
        prompt_tokens=submission.prompt_len,
        completion_tokens=submission.generated_len,
    )


def _engine_end(slot: int, end: SequenceEnd) -> End:
    error: HeadraceError | None = None
    if end.reason == "error":
        # By contract the request's fault, in words for its sender.
        error = InvalidArgument(end.error)
    return End(
        slot,
        end.reason,
        error,
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        cached_tokens=end.cached_tokens,
        queue_ms=end.queue_ms,
        prefill_ms=end.prefill_ms,
        decode_ms=end.decode_ms,
        stopped_by_token=end.stopped_by_token,
    )
