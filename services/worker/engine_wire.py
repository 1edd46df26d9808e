"""What worker and engine process say to each other over their socket.

Messages are msgpack behind a length of 4 bytes, little-endian; token ids of a
request stay packed. Both sides are of one version, started together: there is no
negotiation. It knows neither process.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import msgspec

from headrace.blocks import unpack_tokens
from headrace.params import SamplingParams
from services.worker.engine import EngineConfig, EngineInfo, SequenceRequest, StepOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

_LENGTH = struct.Struct("<I")
T = TypeVar("T")


class Start(msgspec.Struct, tag="start", array_like=True, frozen=True):
    """First of all: load this engine."""

    engine: str
    config: EngineConfig


class Submit(msgspec.Struct, tag="submit", array_like=True, frozen=True):
    """SequenceRequest, with packed ids."""

    sequence_id: int
    prompt_ids: bytes
    generated_ids: bytes
    sampling: SamplingParams
    namespace_key: bytes
    priority: int
    tenant: str
    timeout_ms: int = 0

    def request(self) -> SequenceRequest:
        """What the engine takes."""
        return SequenceRequest(
            sequence_id=self.sequence_id,
            prompt_ids=unpack_tokens(self.prompt_ids),
            generated_ids=unpack_tokens(self.generated_ids),
            sampling=self.sampling,
            namespace_key=self.namespace_key,
            priority=self.priority,
            tenant=self.tenant,
            timeout_ms=self.timeout_ms,
        )


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    """Stop these sequences."""

    sequence_ids: list[int]


class ListBlocks(msgspec.Struct, tag="blocks?", array_like=True, frozen=True):
    """Asks for Blocks; answered in order with the steps."""


class Reported(msgspec.Struct, tag="report", array_like=True, frozen=True):
    """Progress while loading."""

    phase: str
    fraction: float | None


class Started(msgspec.Struct, tag="started", array_like=True, frozen=True):
    """The engine is loaded."""

    info: EngineInfo


class StartFailed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """The text of the StartupError; the process ends."""

    message: str


class Stepped(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """A step's output. Its stats count all sequences up to `last_sequence_id`."""

    output: StepOutput
    last_sequence_id: int


class Blocks(msgspec.Struct, tag="blocks", array_like=True, frozen=True):
    """Short ids of all blocks in the prefix cache."""

    owned: list[int]


Command: TypeAlias = Start | Submit | Cancel | ListBlocks
Reply: TypeAlias = Reported | Started | StartFailed | Stepped | Blocks

_encoder = msgspec.msgpack.Encoder()
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def encode(message: Command | Reply) -> bytes:
    """One message, its length before it."""
    data = _encoder.encode(message)
    return _LENGTH.pack(len(data)) + data


class Splitter:
    """Cuts a byte stream into messages, without their lengths."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that `data` completes. Exhaust it before the next call."""
        self._data += data
        start, end = 0, len(self._data)
        try:
            while end - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._data, start)
                if end - start - _LENGTH.size < length:
                    break
                start += _LENGTH.size + length
                yield bytes(self._data[start - length : start])
        finally:
            del self._data[:start]
