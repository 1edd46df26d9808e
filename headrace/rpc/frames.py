"""The arithmetic of shared streams: frames, chunks, acknowledgements. No I/O.

A frame is one message on a stream that carries many requests. `Outbox` packs
what waits into frames below a length, long messages as interleaved chunks;
`Assembler` puts chunks together again. `FrameLog` and `FrameReceiver` are the
two ends of a resumable stream:

    sent and acknowledged | sent, kept in the log | not sent yet
                        ack                     last

After a reconnect the sender repeats its log; the receiver drops what it has.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from headrace.errors import InvalidArgument, ResourceExhausted
from headrace.rpc.options import FRAME_LEN, MAX_CHUNKED_LEN
from headrace.v1 import types_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

M = TypeVar("M", bound="Message")
F = TypeVar("F")

#: A message longer than this travels in chunks of at most this length.
CHUNK_LEN = 16 << 10
#: What putting a message or chunk into a frame adds to its length, at most.
_FRAMING_LEN = 24


class Outbox(Generic[M]):
    """Messages that wait for the next frame, bounded in bytes."""

    def __init__(self, max_len: int) -> None:
        self._max_len = max_len
        self._len = 0
        self._small: deque[tuple[int, M, int]] = deque()
        self._long: deque[tuple[int, bytes, int]] = deque()

    def __bool__(self) -> bool:
        return bool(self._small or self._long)

    def push(self, key: int, message: M) -> None:
        """Queue `message` under `key`. Raises ResourceExhausted when full."""
        length = message.ByteSize()
        if self._len + length > self._max_len:
            raise ResourceExhausted(
                f"{self._len} bytes wait on this stream already (limit {self._max_len})",
                retry_after_ms=100,
            )
        self._len += length
        if length <= CHUNK_LEN:
            self._small.append((key, message, length))
        else:
            self._long.append((key, message.SerializeToString(), 0))

    def discard(self, key: int) -> bool:
        """Forget what waits under `key`. True if nothing of it was ever sent."""
        untouched = False
        for item in [i for i in self._small if i[0] == key]:
            self._small.remove(item)
            self._len -= item[2]
            untouched = True
        for long in [i for i in self._long if i[0] == key]:
            self._long.remove(long)
            self._len -= len(long[1]) - long[2]
            untouched = long[2] == 0
        return untouched

    def clear(self) -> None:
        """Forget everything."""
        self._small.clear()
        self._long.clear()
        self._len = 0

    def take(self, budget: int = FRAME_LEN) -> tuple[list[M], list[types_pb2.Chunk]]:
        """The next frame's messages and chunks, `budget` bytes at most.

        Small messages go first; long ones share what is left in turn.
        """
        messages: list[M] = []
        while self._small and (not messages or budget >= self._small[0][2] + _FRAMING_LEN):
            _, message, length = self._small.popleft()
            messages.append(message)
            budget -= length + _FRAMING_LEN
            self._len -= length
        chunks: list[types_pb2.Chunk] = []
        while self._long and (budget >= CHUNK_LEN + _FRAMING_LEN or not (messages or chunks)):
            key, data, start = self._long.popleft()
            end = min(start + CHUNK_LEN, len(data))
            last = end == len(data)
            chunks.append(types_pb2.Chunk(id=key, data=data[start:end], last=last))
            budget -= end - start + _FRAMING_LEN
            self._len -= end - start
            if not last:
                self._long.append((key, data, end))
        return messages, chunks


class Assembler:
    """Puts chunks together, bounded in bytes over all unfinished messages."""

    def __init__(self, max_len: int = MAX_CHUNKED_LEN) -> None:
        self._max_len = max_len
        self._len = 0
        self._parts: dict[int, list[bytes]] = {}

    def add(self, chunk: types_pb2.Chunk) -> bytes | None:
        """The whole message if this chunk completes it. Raises InvalidArgument over the limit."""
        if self._len + len(chunk.data) > self._max_len:
            self.discard(chunk.id)
            raise InvalidArgument(f"chunked messages exceed {self._max_len} bytes")
        self._len += len(chunk.data)
        parts = self._parts.setdefault(chunk.id, [])
        parts.append(chunk.data)
        if not chunk.last:
            return None
        whole = b"".join(self._parts.pop(chunk.id))
        self._len -= len(whole)
        return whole

    def discard(self, key: int) -> bool:
        """Forget an unfinished message. True if there was one."""
        parts = self._parts.pop(key, None)
        if parts is None:
            return False
        self._len -= sum(map(len, parts))
        return True


class FrameLog(Generic[F]):
    """Frames sent and not acknowledged, bounded in bytes."""

    def __init__(self, max_len: int) -> None:
        self.last = 0
        self._max_len = max_len
        self._len = 0
        self._frames: deque[tuple[int, F, int]] = deque()

    @property
    def is_full(self) -> bool:
        """The other side has acknowledged too little for too long."""
        return self._len > self._max_len

    def next_number(self) -> int:
        """The number for the next frame; `keep` it next."""
        self.last += 1
        return self.last

    def keep(self, frame: F, length: int) -> None:
        """Keep the frame that got the last number until it is acknowledged."""
        self._frames.append((self.last, frame, length))
        self._len += length

    def acknowledge(self, number: int) -> None:
        """The other side has all frames up to `number`."""
        while self._frames and self._frames[0][0] <= number:
            self._len -= self._frames.popleft()[2]

    def unacknowledged(self) -> list[F]:
        """What to repeat after a reconnect, in order."""
        return [frame for _, frame, _ in self._frames]


class FrameReceiver:
    """What has arrived of the other side's frames."""

    def __init__(self) -> None:
        self.last = 0

    def accept(self, number: int) -> bool:
        """Whether the frame is new. Raises InvalidArgument if frames before it are missing."""
        if number == 0:
            return True
        if number <= self.last:
            return False
        if number != self.last + 1:
            raise InvalidArgument(f"frame {number} came after frame {self.last}")
        self.last = number
        return True
