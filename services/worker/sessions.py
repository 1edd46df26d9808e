"""Gateways' sessions: resumable streams that carry many sequences.

A session outlives its connection for a grace. What its sequences bring meanwhile
gathers, merged and bounded; the next connection repeats what was not acknowledged
and goes on. At the end of the grace its sequences are stopped.

    engine step ─► Session.slots, .tokens, ._ends ─► next_frame ─► FrameLog ─► stream
                   waits, merged                      numbered      kept until acknowledged

Invariants: a token is in exactly one numbered frame; a sequence's end is in the
frame of its last token or a later one; numbered frames are made one at a time, by
the session's only connection.

The messages of `Attach` stop here; nothing else of the worker reads them.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.message import DecodeError

from headrace.errors import HeadraceError, InvalidArgument, ResourceExhausted
from headrace.rpc.frames import Assembler, FrameLog, FrameReceiver
from headrace.rpc.options import FRAME_LEN
from headrace.v1 import worker_pb2
from services.worker import convert
from services.worker.dispatch import End

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from headrace.v1.types_pb2 import Chunk
    from services.worker.dispatch import Sequences

#: Tokens in one frame: 8 bytes each at most, as varints, keep it below FRAME_LEN.
MAX_FRAME_TOKENS = 7500
#: Tokens that may wait for a session's stream (8 bytes each).
MAX_WAITING_TOKENS = 1 << 18
#: Bytes of log probabilities that may wait.
MAX_WAITING_SCORES_LEN = 4 << 20
#: What protobuf adds to a message of log probabilities, at most.
_SCORES_EXTRA_LEN = 24
#: Ends that may wait; a gateway that submits on without reading is cut off.
MAX_WAITING_ENDS = 8192
#: Bytes of frames sent and not acknowledged.
MAX_LOG_LEN = 4 << 20
#: Frames received after which an acknowledgement goes out by itself.
ACK_EVERY = 16
_RETRY_AFTER_MS = 500

log = logging.getLogger("headrace.worker")


class _Score(NamedTuple):
    """Log probabilities that wait."""

    #: They go before, or with, this token of the session, counted from its first.
    at: int
    slot: int
    data: bytes
    prompt: bool


class Session:
    """One gateway's session. An Outlet of its sequences."""

    def __init__(self, session_id: str, gateway_id: str, sequences: Sequences) -> None:
        self.session_id = session_id
        self.gateway_id = gateway_id
        self.slots = array("I")
        self.tokens = array("I")
        #: Called when there is something to send; the connection sets it.
        self.wake: Callable[[], None] = _nobody
        #: Why the session must close, once it must.
        self.broken: HeadraceError | None = None
        self._sequences = sequences
        self._ends: deque[End] = deque()
        self._scores: deque[_Score] = deque()
        self._scores_len = 0
        # Tokens put in frames so far, where there are scores to place among them.
        self._num_framed = 0
        self._log: FrameLog[worker_pb2.AttachResponse] = FrameLog(MAX_LOG_LEN)
        self._received = FrameReceiver()
        self._acknowledged = 0
        self._assembler = Assembler()
        # Slots whose remaining chunks are to be ignored.
        self._refused: set[int] = set()
        self._live: dict[int, int] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, waits or is unacknowledged."""
        return not (self.has_output or self._log.unacknowledged())

    @property
    def has_output(self) -> bool:
        """Whether something runs or waits to be sent."""
        return bool(self._live or self.slots or self._ends or self._scores)

    def receive(self, request: worker_pb2.AttachRequest) -> None:
        """Take one frame of the gateway. Raises InvalidArgument if frames are missing."""
        self._log.acknowledge(request.ack)
        if not self._received.accept(request.frame):
            return
        for submission in request.submissions:
            self._submit(submission)
        for chunk in request.chunks:
            self._add_chunk(chunk)
        for slot in request.cancels:
            self._cancel(slot)
        if self._ends or self._received.last - self._acknowledged >= ACK_EVERY:
            self.flush()

    def next_frame(self) -> worker_pb2.AttachResponse | None:
        """The next numbered frame, kept for repetition; None if nothing waits."""
        if not (self.slots or self._ends or self._scores):
            return None
        scores, count = self._take_scores() if self._scores else ((), MAX_FRAME_TOKENS)
        frame = worker_pb2.AttachResponse(
            slots=self.slots[:count], token_ids=self.tokens[:count], logprobs=scores
        )
        del self.slots[:count], self.tokens[:count]
        self._num_framed += len(frame.slots)
        budget = FRAME_LEN - (frame.ByteSize() if scores else 8 * len(frame.slots))
        while self._ends and not self.slots and not self._scores:
            ended = convert.end(self._ends[0])
            budget -= ended.ByteSize() + 8
            if budget < 0 and frame.ends:
                break
            frame.ends.append(ended)
            self._ends.popleft()
        frame.frame = self._log.next_number()
        self._stamp(frame)
        self._log.keep(frame, frame.ByteSize())
        return frame

    def acknowledgement(self) -> worker_pb2.AttachResponse | None:
        """A frame that only acknowledges, if it is time for one."""
        if self._received.last - self._acknowledged < ACK_EVERY:
            return None
        return self.unnumbered()

    def unnumbered(
        self,
        opened: worker_pb2.AttachOpened | None = None,
        heartbeat: worker_pb2.Heartbeat | None = None,
    ) -> worker_pb2.AttachResponse:
        """A frame that is neither kept nor repeated."""
        frame = worker_pb2.AttachResponse(opened=opened, heartbeat=heartbeat)
        self._stamp(frame)
        return frame

    def unacknowledged(self) -> Iterable[worker_pb2.AttachResponse]:
        """What a new connection repeats first."""
        return self._log.unacknowledged()

    def score(self, slot: int, data: bytes, *, prompt: bool) -> None:
        """See Outlet."""
        self._scores.append(_Score(self._num_framed + len(self.slots), slot, data, prompt))
        self._scores_len += len(data)

    def end(self, end: End) -> None:
        """See Outlet."""
        self._live.pop(end.slot, None)
        self._ends.append(end)
        if len(self._ends) > MAX_WAITING_ENDS and self.broken is None:
            self.broken = ResourceExhausted(
                f"{len(self._ends)} ends wait for gateway {self.gateway_id}, which does not read",
                retry_after_ms=_RETRY_AFTER_MS,
            )

    def flush(self) -> None:
        """See Outlet. Over a bound, the session's sequences end with an error."""
        if self._live and (
            self._log.is_full
            or len(self.slots) > MAX_WAITING_TOKENS
            or self._scores_len > MAX_WAITING_SCORES_LEN
        ):
            self._overflow()
        self.wake()

    def close(self) -> None:
        """Stop all that runs; nothing more is sent."""
        self._sequences.drop(self._live.values())
        self._live.clear()
        self._discard_output()
        self._ends.clear()

    def _take_scores(self) -> tuple[list[worker_pb2.SequenceLogprobs], int]:
        """The scores of the next frame, and how many tokens go with them.

        A token and its score share a frame; a prompt's scores precede its tokens.
        """
        taken: list[worker_pb2.SequenceLogprobs] = []
        budget = FRAME_LEN
        while self._scores:
            at, slot, data, prompt = self._scores[0]
            num_before = at - self._num_framed
            if num_before >= MAX_FRAME_TOKENS:
                break
            budget -= len(data) + _SCORES_EXTRA_LEN
            # 8 bytes a token: those before it, and its own.
            if taken and budget < 8 * (num_before + 1):
                return taken, num_before
            self._scores.popleft()
            self._scores_len -= len(data)
            taken.append(
                worker_pb2.SequenceLogprobs(slot=slot, prompt=data)
                if prompt
                else worker_pb2.SequenceLogprobs(slot=slot, tokens=data)
            )
        return taken, min(MAX_FRAME_TOKENS, max(0, budget) // 8)

    def _discard_output(self) -> None:
        del self.slots[:], self.tokens[:]
        self._scores.clear()
        self._scores_len = 0

    def _overflow(self) -> None:
        error = ResourceExhausted(
            f"gateway {self.gateway_id} reads too slowly: more than {MAX_LOG_LEN} bytes "
            f"unacknowledged, {MAX_WAITING_TOKENS} tokens or {MAX_WAITING_SCORES_LEN} bytes of "
            "log probabilities waiting",
            retry_after_ms=_RETRY_AFTER_MS,
        )
        log.warning("session %s: %s", self.session_id, error)
        self._discard_output()
        for sequence_id in list(self._live.values()):
            self._sequences.fail(sequence_id, error)

    def _submit(self, message: worker_pb2.Submission) -> None:
        submission = convert.submission(message)
        slot = submission.slot
        if slot in self._live:
            # A faulty gateway can't know which of the two an end would mean: both end.
            error = InvalidArgument(f"slot {slot} is in use", field="slot")
            self._sequences.fail(self._live[slot], error)
            self.end(End(slot, "error", error))
        elif self._log.is_full:
            self.end(End(slot, "error", ResourceExhausted("acknowledge frames first")))
        elif sequence_id := self._sequences.submit(submission, self):
            self._live[slot] = sequence_id

    def _add_chunk(self, chunk: Chunk) -> None:
        slot = chunk.id
        if slot in self._refused:
            if chunk.last:
                self._refused.discard(slot)
            return
        try:
            data = self._assembler.add(chunk)
            if data is None:
                return
            message = worker_pb2.Submission.FromString(data)
            if message.slot != slot:
                raise InvalidArgument(f"chunks of slot {slot} hold slot {message.slot}")
        except (InvalidArgument, DecodeError) as error:
            if not chunk.last:
                self._refused.add(slot)
            self.end(End(slot, "error", InvalidArgument(f"malformed submission: {error}")))
        else:
            self._submit(message)

    def _cancel(self, slot: int) -> None:
        if slot in self._live:
            self._sequences.cancel(self._live[slot])
        elif self._assembler.discard(slot):
            self.end(End(slot, "cancelled"))

    def _stamp(self, frame: worker_pb2.AttachResponse) -> None:
        frame.ack = self._acknowledged = self._received.last


def _nobody() -> None:
    """There is no connection."""
