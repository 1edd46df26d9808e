"""Frames, chunks and acknowledgements, over any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import InvalidArgument, ResourceExhausted
from headrace.rpc.frames import CHUNK_LEN, Assembler, FrameLog, FrameReceiver, Outbox
from headrace.rpc.options import FRAME_LEN
from headrace.v1 import types_pb2


def message(size: int, mark: int) -> types_pb2.WorkerRef:
    return types_pb2.WorkerRef(worker_id="x" * size, generation=mark)


@given(st.lists(st.integers(0, 5 * CHUNK_LEN), max_size=30))
def test_everything_pushed_comes_out_once_whole_and_in_bounded_frames(sizes: list[int]) -> None:
    outbox: Outbox[types_pb2.WorkerRef] = Outbox(64 << 20)
    for mark, size in enumerate(sizes):
        outbox.push(mark, message(size, mark))
    assembler = Assembler()
    got: dict[int, int] = {}
    while outbox:
        small, chunks = outbox.take()
        assert small or chunks
        for item in small:
            got[item.generation] = len(item.worker_id)
        for chunk in chunks:
            whole = assembler.add(chunk)
            if whole is not None:
                item = types_pb2.WorkerRef.FromString(whole)
                got[item.generation] = len(item.worker_id)
        refs = [types_pb2.Error(message="x" * m.ByteSize()) for m in small]
        framed = sum(r.ByteSize() for r in refs) + sum(c.ByteSize() + 4 for c in chunks)
        assert framed <= FRAME_LEN
    assert got == dict(enumerate(sizes))


def test_a_long_message_does_not_hold_up_a_short_one() -> None:
    outbox: Outbox[types_pb2.WorkerRef] = Outbox(64 << 20)
    outbox.push(1, message(10 * FRAME_LEN, 1))
    outbox.take()
    outbox.push(2, message(10, 2))
    small, chunks = outbox.take()
    assert [m.generation for m in small] == [2]
    assert [c.id for c in chunks] == [1] * len(chunks)


def test_long_messages_share_a_frame() -> None:
    outbox: Outbox[types_pb2.WorkerRef] = Outbox(64 << 20)
    for mark in (1, 2):
        outbox.push(mark, message(10 * FRAME_LEN, mark))
    _, chunks = outbox.take()
    assert {c.id for c in chunks} == {1, 2}


def test_the_outbox_is_bounded_and_discards() -> None:
    outbox: Outbox[types_pb2.WorkerRef] = Outbox(100_000)
    outbox.push(1, message(60_000, 1))
    with pytest.raises(ResourceExhausted, match="limit 100000"):
        outbox.push(2, message(60_000, 2))
    assert outbox.discard(1)
    outbox.push(2, message(60_000, 2))
    outbox.take(CHUNK_LEN)
    assert not outbox.discard(2), "a part of it was sent"
    assert not outbox
    outbox.push(3, message(90_000, 3))


def test_the_assembler_is_bounded_over_all_unfinished() -> None:
    assembler = Assembler(max_len=100)
    assert assembler.add(types_pb2.Chunk(id=1, data=b"a" * 60)) is None
    with pytest.raises(InvalidArgument, match="100 bytes"):
        assembler.add(types_pb2.Chunk(id=2, data=b"b" * 60))
    assert assembler.add(types_pb2.Chunk(id=1, data=b"c", last=True)) == b"a" * 60 + b"c"
    assert assembler.add(types_pb2.Chunk(id=3, data=b"d" * 100, last=True)) == b"d" * 100


class Link:
    """Both ends of a resumable stream and a wire that breaks."""

    def __init__(self) -> None:
        self.log: FrameLog[tuple[int, str]] = FrameLog(1 << 20)
        self.receiver = FrameReceiver()
        self.wire: list[tuple[int, str]] = []
        self.received: list[str] = []

    def send(self, text: str) -> None:
        frame = (self.log.next_number(), text)
        self.log.keep(frame, len(text))
        self.wire.append(frame)

    def deliver(self) -> None:
        if self.wire:
            number, text = self.wire.pop(0)
            if self.receiver.accept(number):
                self.received.append(text)

    def reconnect(self) -> None:
        self.wire = self.log.unacknowledged()


@given(st.lists(st.sampled_from(["send", "deliver", "acknowledge", "break"]), max_size=200))
def test_a_resumable_stream_delivers_exactly_once_in_order(events: list[str]) -> None:
    link = Link()
    sent: list[str] = []
    for number, event in enumerate(events):
        if event == "send":
            sent.append(str(number))
            link.send(str(number))
        elif event == "deliver":
            link.deliver()
        elif event == "acknowledge":
            link.log.acknowledge(link.receiver.last)
        else:
            link.reconnect()
    link.reconnect()
    while link.wire:
        link.deliver()
    assert link.received == sent


def test_missing_frames_and_full_logs_are_noticed() -> None:
    receiver = FrameReceiver()
    assert receiver.accept(1)
    with pytest.raises(InvalidArgument, match="frame 3 came after frame 1"):
        receiver.accept(3)
    assert receiver.accept(0), "frame 0 is outside the numbering"
    log: FrameLog[str] = FrameLog(10)
    log.next_number()
    log.keep("x", 11)
    assert log.is_full
    log.acknowledge(1)
    assert not log.is_full
