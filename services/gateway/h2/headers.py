"""A connection's headers: frames to blocks, blocks to fields. It knows no streams' state.

A block may come in several frames, with nothing else in between; the decoder's
table is the connection's, so every block is decoded, wanted or not.
"""

from __future__ import annotations

from typing import NamedTuple

from hpack import Decoder, HPACKError

from services.gateway.h2 import wire
from services.gateway.h2.wire import ConnectionFault

#: Bytes of one call's headers, as sent and as decoded.
MAX_HEADERS_LEN = 32 << 10


class Headers(NamedTuple):
    """What opens or ends a client's side of a stream."""

    stream_id: int
    is_last: bool
    fields: list[tuple[str, str]]


class HeaderReader:
    """All of one connection's headers. Raises ConnectionFault."""

    def __init__(self) -> None:
        self._decoder = Decoder(MAX_HEADERS_LEN)
        self._stream_id = 0
        self._is_last = False
        self._block = bytearray()

    @property
    def is_open(self) -> bool:
        """Whether a block has begun and is not complete."""
        return self._stream_id != 0

    def begin(self, flags: int, stream_id: int, payload: bytes) -> Headers | None:
        """A HEADERS frame; returns the headers once they are complete."""
        block = wire.unpadded(flags, payload)
        if flags & wire.WITH_PRIORITY:
            if len(block) < 5:
                raise ConnectionFault(wire.FRAME_SIZE_ERROR, "a HEADERS frame of a wrong length")
            block = block[5:]
        if not stream_id & 1:
            raise ConnectionFault(wire.PROTOCOL_ERROR, "headers on a stream that is not a client's")
        self._stream_id, self._is_last = stream_id, bool(flags & wire.END_STREAM)
        return self._add(flags, block)

    def go_on(self, kind: int, flags: int, stream_id: int, payload: bytes) -> Headers | None:
        """The frame after one that left a block open."""
        if kind != wire.CONTINUATION or stream_id != self._stream_id:
            raise ConnectionFault(wire.PROTOCOL_ERROR, "headers were interrupted")
        return self._add(flags, payload)

    def _add(self, flags: int, data: bytes) -> Headers | None:
        self._block += data
        if len(self._block) > MAX_HEADERS_LEN:
            raise ConnectionFault(wire.ENHANCE_YOUR_CALM, f"headers above {MAX_HEADERS_LEN} bytes")
        if not flags & wire.END_HEADERS:
            return None
        stream_id, self._stream_id = self._stream_id, 0
        block, self._block = bytes(self._block), bytearray()
        try:
            fields = [(str(name), str(value)) for name, value in self._decoder.decode(block)]
        except (HPACKError, UnicodeDecodeError) as error:
            raise ConnectionFault(wire.COMPRESSION_ERROR, f"bad headers: {error}") from error
        return Headers(stream_id, self._is_last, fields)
