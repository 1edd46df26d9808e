"""A session's bounds: what a gateway that does not acknowledge or read costs the worker."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import pytest

from headrace.blocks import pack_tokens
from headrace.errors import ResourceExhausted
from headrace.v1 import types_pb2, worker_pb2
from services.worker import sessions
from services.worker.dispatch import Sequences
from services.worker.engine import EngineInfo, SequenceEnd, StepOutput
from services.worker.sessions import Session

if TYPE_CHECKING:
    from services.worker.engine_wire import Submit

INFO = EngineInfo(
    engine="none",
    model_revision="r",
    tokenizer_digest="t",
    vocab_size=1000,
    context_len=1 << 20,
    block_size=16,
    total_blocks=8,
    max_sequences=10_000,
    eos_token_ids=(),
    resume="exact",
    sampling=frozenset({"temperature"}),
)


class Engine:
    """Takes sequences and steps them when told to, a token each."""

    def __init__(self) -> None:
        self.running: list[int] = []
        self.cancelled: list[int] = []
        self._steps = count(1)
        self._ends: list[SequenceEnd] = []

    def submit(self, request: Submit) -> None:
        self.running.append(request.sequence_id)

    def cancel(self, sequence_ids: list[int]) -> None:
        for number in sequence_ids:
            if number in self.running:
                self.running.remove(number)
                self.cancelled.append(number)
                self._ends.append(SequenceEnd(number, "cancelled", 1, 0, 1, 0, 0, 0))

    def step(self, tokens_each: int = 1) -> StepOutput:
        ends, self._ends = self._ends, []
        ids = self.running * tokens_each
        return StepOutput(next(self._steps), ids, [999] * len(ids), ends)


class Setup:
    """A session over that engine."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.sequences = Sequences(self.engine, INFO, max_queued=0, worker_id="w")
        self.session = Session("s", "g", self.sequences)
        self._frames = count(1)

    def submit(self, *slots: int) -> None:
        self.session.receive(
            worker_pb2.AttachRequest(
                frame=next(self._frames), submissions=[submission(slot) for slot in slots]
            )
        )

    def frames(self) -> list[worker_pb2.AttachResponse]:
        return list(iter(self.session.next_frame, None))


def submission(slot: int) -> worker_pb2.Submission:
    return worker_pb2.Submission(
        slot=slot,
        prompt_ids=pack_tokens([1]),
        sampling=types_pb2.SamplingParams(temperature=0, seed=0, max_tokens=1 << 19),
        namespace_key=bytes(16),
    )


@pytest.fixture
async def setup() -> Setup:
    return Setup()


async def test_a_step_is_one_frame_however_many_sequences(setup: Setup) -> None:
    setup.submit(*range(100))
    setup.sequences.on_step(setup.engine.step())
    (frame,) = setup.frames()
    assert sorted(frame.slots) == list(range(100))
    assert frame.frame == 1
    assert frame.ack == 1


async def test_frames_stay_below_their_length_whatever_the_slots(setup: Setup) -> None:
    setup.submit(*range((1 << 32) - 400, 1 << 32))
    setup.sequences.on_step(setup.engine.step(100))
    for slot in range((1 << 32) - 400, 1 << 32):
        setup.session.end(sessions.End(slot, "error", ResourceExhausted("x" * 300)))
    frames = setup.frames()
    assert sum(len(frame.slots) for frame in frames) == 40_000
    assert sum(len(frame.ends) for frame in frames) == 400
    assert max(frame.ByteSize() for frame in frames) <= sessions.FRAME_LEN
    # No end comes before its sequence's tokens.
    assert not any(frame.ends for frame in frames[: 40_000 // sessions.MAX_FRAME_TOKENS])


async def test_without_acknowledgements_sequences_end_and_memory_is_bounded(setup: Setup) -> None:
    setup.submit(*range(100))
    frames: list[worker_pb2.AttachResponse] = []
    while setup.engine.running:
        setup.sequences.on_step(setup.engine.step(70))
        frames += setup.frames()
    assert len(setup.engine.cancelled) == 100
    held = sum(frame.ByteSize() for frame in setup.session.unacknowledged())
    assert held < sessions.MAX_LOG_LEN + (256 << 10)
    ends = [end for frame in frames for end in frame.ends]
    assert sorted(end.slot for end in ends) == list(range(100))
    assert {end.error.code for end in ends} == {8}
    # The engine's own ends of what was cancelled are no second ends.
    setup.sequences.on_step(setup.engine.step())
    assert setup.frames() == []
    # Nothing new until it acknowledges; then all is well.
    setup.submit(200)
    assert [end.slot for frame in setup.frames() for end in frame.ends] == [200]
    setup.session.receive(worker_pb2.AttachRequest(ack=frames[-1].frame))
    setup.submit(201)
    setup.sequences.on_step(setup.engine.step())
    assert [list(frame.slots) for frame in setup.frames()] == [[201]]


async def test_without_a_connection_what_waits_is_bounded(setup: Setup) -> None:
    setup.submit(*range(100))
    while setup.engine.running:
        setup.sequences.on_step(setup.engine.step(70))
        assert len(setup.session.slots) <= sessions.MAX_WAITING_TOKENS + 7000
    assert not setup.session.slots
    assert len([end for frame in setup.frames() for end in frame.ends]) == 100


async def test_a_gateway_that_submits_without_reading_is_cut_off(setup: Setup) -> None:
    setup.sequences.draining = True
    for slot in range(sessions.MAX_WAITING_ENDS + 1):
        assert setup.session.broken is None
        setup.submit(slot)
    assert isinstance(setup.session.broken, ResourceExhausted)


async def test_closing_stops_everything(setup: Setup) -> None:
    setup.submit(1, 2)
    setup.session.close()
    assert setup.engine.cancelled == [1, 2]
    setup.sequences.on_step(setup.engine.step())
    assert setup.frames() == []
    assert len(setup.sequences) == 0
    assert setup.sequences.idle.is_set()
