"""A request on its way: its sequences, its deadline, its end.

    start ── launch ──> running ──> done | failed | cancelled     (over)

However it ends, it ends once: every sequence still on a worker is cancelled
there, every reservation is released, its timer and its tasks are gone, and the
sink hears nothing more.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from headrace import telemetry
from headrace.errors import DeadlineExceeded
from services.gateway.generation import Usage
from services.gateway.tracing import FIRST_TOKEN_EVENT

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from headrace.errors import HeadraceError
    from headrace.telemetry import Span
    from services.gateway.detokenizer import DetokenizerTable
    from services.gateway.generation import GenerationRequest, Sink
    from services.gateway.leg import Leg
    from services.gateway.models import Model
    from services.gateway.peers import Encoded
    from services.gateway.sequence import Sequence

log = logging.getLogger("headrace.gateway")

#: How long to wait, after a stop string, for the worker's word on cached tokens.
_LAST_WORD_S = 0.25


class Mover(Protocol):
    """Who finds a sequence that lost its worker another one."""

    def move(self, request: RunningRequest, sequence: Sequence, error: HeadraceError) -> None:
        """Start moving `sequence` (it has left its leg), or fail the request."""


class RunningRequest:
    """A `Generation`. Made inside the loop; `on_over(self)` is called once."""

    def __init__(
        self,
        request: GenerationRequest,
        sink: Sink,
        span: Span,
        *,
        timeout_s: float,
        mover: Mover,
        on_over: Callable[[RunningRequest], None],
    ) -> None:
        self.request = request
        self.sink = sink
        self.span = span
        self.is_over = False
        self.timeout_s = timeout_s
        self.sequences: list[Sequence] = []
        self.model: Model
        self.encoded: Encoded
        self._mover = mover
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_s
        self._num_open = 0
        self._had_first_token = False
        self._timers: list[asyncio.TimerHandle] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def prompt_ids(self) -> bytes:
        """See Generation."""
        return self.encoded.token_ids

    @property
    def vocabulary(self) -> DetokenizerTable:
        """See Generation."""
        return self.model.table

    def remaining_s(self) -> float:
        """What the deadline leaves. Raises DeadlineExceeded if that is nothing."""
        remaining = self._deadline - self._loop.time()
        if remaining <= 0:
            raise self._too_late()
        return remaining

    def launch(self, sequences: list[Sequence], leg: Leg) -> None:
        """All sequences are about to go where `leg` says; the deadline holds from now on."""
        self.sequences = sequences
        self._num_open = len(sequences)
        for sequence in sequences:
            sequence.leg = leg
        self._timers.append(self._loop.call_at(self._deadline, self._expire))

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Run `work` for this request; it is cancelled when the request is over."""
        task = asyncio.create_task(work, name=f"moving {self.request.request_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # How it ends.

    def cancel(self) -> None:
        """Stop everything; the sink hears nothing more. Safe at any time."""
        if self.is_over:
            return
        self.is_over = True
        for timer in self._timers:
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        for sequence in self.sequences:
            if sequence.ticket is not None:
                sequence.ticket.cancel()
            self._leave(sequence)
        self._on_over(self)

    def fail(self, error: HeadraceError) -> None:
        """End with an error."""
        if not self.is_over:
            self.cancel()
            self.sink.on_error(error)

    def _expire(self) -> None:
        self.fail(self._too_late())

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the request took longer than its {self.timeout_s:g} s")

    # What its sequences say.

    def first_token_of(self, sequence: Sequence) -> None:
        """`sequence` got its first token on its present worker."""
        if sequence.leg is not None:
            sequence.leg.first_token()
        if not self._had_first_token:
            self._had_first_token = True
            if telemetry.is_enabled():
                self.span.add_event(FIRST_TOKEN_EVENT)

    def stopped(self, sequence: Sequence) -> None:
        """A stop string ended `sequence`; its worker does not know yet."""
        if sequence.leg is not None:
            # In case the worker says nothing more.
            sequence.cached_tokens = sequence.leg.plan.matched_tokens
        if sequence.ticket is not None:
            sequence.ticket.cancel(listen=True)
        self._timers.append(self._loop.call_later(_LAST_WORD_S, self._close_stopped, sequence))

    def over(self, sequence: Sequence) -> None:
        """`sequence` has ended for the client, and its worker is done with it."""
        if self.is_over or sequence.is_closed:
            return
        sequence.is_closed = True
        self._leave(sequence)
        self._num_open -= 1
        if self._num_open == 0:
            self.cancel()
            self.sink.on_done(self._usage())

    def move(self, sequence: Sequence, error: HeadraceError, *, died: bool) -> None:
        """The worker of `sequence` can't go on with it."""
        if self.is_over:
            return
        if sequence.leg is not None:
            sequence.failed_on.add(sequence.leg.plan.worker.worker_id)
        self._leave(sequence)
        if died:
            sequence.kills = 1 if sequence.progressed else sequence.kills + 1
        log.info("%s/%d moves: %s", self.request.request_id, sequence.index, error.message)
        self._mover.move(self, sequence, error)

    def _close_stopped(self, sequence: Sequence) -> None:
        if sequence.ticket is not None:
            sequence.ticket.cancel()
            sequence.ticket = None
            self.over(sequence)

    def _leave(self, sequence: Sequence) -> None:
        leg, sequence.leg = sequence.leg, None
        if leg is not None:
            leg.leave()

    def _usage(self) -> Usage:
        prompt_tokens = self.encoded.num_tokens
        cached = min(sequence.cached_tokens for sequence in self.sequences)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=sum(len(sequence.generated) for sequence in self.sequences),
            cached_tokens=min(cached, prompt_tokens),
        )
