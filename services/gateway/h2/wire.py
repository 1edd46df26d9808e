"""HTTP/2's and gRPC's bytes, as a server needs them: pure functions, no connection.

Frames are RFC 9113's; header blocks are read by the `hpack` package, and written as
literals that are never indexed (RFC 7541, section 6.2.2); message framing, timeouts
and statuses are those of gRPC over HTTP/2
(https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING

from headrace.errors import InvalidArgument, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_LEN = 9
#: Longest frame that either side sends: HTTP/2's default.
MAX_FRAME_LEN = 1 << 14
MAX_WINDOW = (1 << 31) - 1
DEFAULT_WINDOW = 65535

(
    DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS,
    PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION,
) = range(10)  # fmt: skip

END_STREAM = ACK = 1
END_HEADERS = 4
PADDED = 8
WITH_PRIORITY = 32

NO_ERROR, PROTOCOL_ERROR, _, FLOW_CONTROL_ERROR = range(4)
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = range(5, 10)
ENHANCE_YOUR_CALM = 11

MAX_CONCURRENT_STREAMS_ID, INITIAL_WINDOW_SIZE_ID, MAX_FRAME_SIZE_ID = 3, 4, 5
MAX_HEADER_LIST_SIZE_ID = 6

_HEAD = Struct(">BHBBI")
_SETTING = Struct(">HI")
_U32 = Struct(">I")
_PAIR = Struct(">II")
#: The head of a DATA frame that holds one whole gRPC message, and the message's own head.
MESSAGE_HEAD = Struct(">BHHIBI")

#: Pseudo header `:status: 200`, and the content type.
_STATUS_200 = b"\x88"
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_ENCODINGS = {"identity": None, "gzip": 31, "deflate": 15}
ACCEPTED_ENCODINGS = ", ".join(_ENCODINGS)


class ConnectionFault(Exception):
    """The client broke the protocol; the connection can't go on."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class StreamFault(Exception):
    """The client broke the protocol on one stream, which is reset."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame. `payload` is at most MAX_FRAME_LEN long."""
    length = len(payload)
    return _HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream_id) + payload


def headers(flags: int, stream_id: int, block: bytes) -> bytes:
    """A header block, in as many frames as it takes. `flags` holds END_HEADERS."""
    if len(block) <= MAX_FRAME_LEN:
        return frame(HEADERS, flags, stream_id, block)
    pieces = [block[at : at + MAX_FRAME_LEN] for at in range(0, len(block), MAX_FRAME_LEN)]
    frames = [frame(HEADERS, flags & ~END_HEADERS, stream_id, pieces[0])]
    frames += [frame(CONTINUATION, 0, stream_id, piece) for piece in pieces[1:-1]]
    frames.append(frame(CONTINUATION, END_HEADERS, stream_id, pieces[-1]))
    return b"".join(frames)


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*item) for item in values.items()))


def read_settings(payload: bytes) -> dict[int, int]:
    """Raises ConnectionFault."""
    if len(payload) % _SETTING.size:
        raise ConnectionFault(FRAME_SIZE_ERROR, "a SETTINGS frame of a wrong length")
    return dict(_SETTING.iter_unpack(payload))


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, _U32.pack(increment))


def reset(stream_id: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream_id, _U32.pack(code))


def goaway(last_id: int, code: int, text: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, _PAIR.pack(last_id, code) + text.encode()[:200])


def unpadded(flags: int, payload: bytes) -> bytes:
    """A DATA or HEADERS frame's content. Raises ConnectionFault."""
    start, end = 0, len(payload)
    if flags & PADDED:
        if not payload or payload[0] >= end:
            raise ConnectionFault(PROTOCOL_ERROR, "a frame with more padding than content")
        start, end = 1, end - payload[0]
    return payload[start:end]


def header_block(headers: Iterable[tuple[str, str]]) -> bytes:
    parts = []
    for name, value in headers:
        data = value.encode("latin-1")
        parts += [b"\0", _length(len(name)), name.encode("ascii"), _length(len(data)), data]
    return b"".join(parts)


def _length(value: int) -> bytes:
    """RFC 7541, section 5.1, with a prefix of 7 bits."""
    if value < 127:
        return bytes((value,))
    value -= 127
    out = bytearray((127,))
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


#: What begins every answer.
RESPONSE_HEAD = _STATUS_200 + header_block(
    [("content-type", "application/grpc"), ("grpc-accept-encoding", ACCEPTED_ENCODINGS)]
)


def status_block(code: int, message: str, metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    """The headers that end a call."""
    headers = [("grpc-status", str(code))]
    if message:
        headers.append(("grpc-message", _percent(message)))
    headers += [(key, _metadata_value(key, value)) for key, value in metadata]
    return header_block(headers)


def http_status_block(status: int, text: str) -> bytes:
    """The headers of an answer to what is no gRPC call."""
    return header_block([(":status", str(status)), ("grpc-status", "2"), ("grpc-message", text)])


def _percent(message: str) -> str:
    return "".join(
        chr(byte) if 32 <= byte < 127 and byte != 37 else f"%{byte:02X}"
        for byte in message.encode("utf-8", "replace")
    )


def _metadata_value(key: str, value: str | bytes) -> str:
    data = value.encode() if isinstance(value, str) else value
    if key.endswith("-bin"):
        return base64.b64encode(data).rstrip(b"=").decode("ascii")
    return data.decode("latin-1")


@dataclass(frozen=True, slots=True)
class CallHead:
    """What a call's headers say."""

    path: str
    metadata: tuple[tuple[str, str | bytes], ...]
    timeout_s: float | None
    encoding: str


@dataclass(frozen=True, slots=True)
class NotGrpc:
    """Headers of something else, and the HTTP status it is answered with."""

    status: int
    text: str


def read_head(headers: Iterable[tuple[str, str]]) -> CallHead | NotGrpc:
    """Raises StreamFault for malformed headers, InvalidArgument for a bad value."""
    pseudo: dict[str, str] = {}
    given: list[tuple[str, str]] = []
    for name, value in headers:
        if name.startswith(":"):
            if given or name in pseudo:
                raise StreamFault(PROTOCOL_ERROR)
            pseudo[name] = value
        elif name.lower() != name or name == "connection":
            raise StreamFault(PROTOCOL_ERROR)
        else:
            given.append((name, value))
    if not {":method", ":scheme", ":path"} <= pseudo.keys():
        raise StreamFault(PROTOCOL_ERROR)
    if pseudo[":method"] != "POST":
        return NotGrpc(405, "gRPC calls are POST")
    known = dict(given)
    kind = known.get("content-type", "")
    if kind != "application/grpc" and not kind.startswith(
        ("application/grpc+", "application/grpc;")
    ):
        return NotGrpc(415, "content-type must be application/grpc")
    timeout = known.get("grpc-timeout")
    return CallHead(
        path=pseudo[":path"],
        metadata=tuple((name, _read_value(name, value)) for name, value in given),
        timeout_s=None if timeout is None else _read_timeout(timeout),
        encoding=known.get("grpc-encoding", "identity"),
    )


def _read_value(name: str, value: str) -> str | bytes:
    if not name.endswith("-bin"):
        return value
    # Values of one key may come joined; the first is enough for us.
    first = value.partition(",")[0].strip()
    try:
        return base64.b64decode(first + "=" * (-len(first) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(f"metadata {name!r} is not base64", field=name) from None


def _read_timeout(text: str) -> float:
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not (number.isascii() and number.isdigit() and len(number) <= 8):
        raise InvalidArgument(
            "grpc-timeout must be up to 8 digits and a unit of H, M, S, m, u, n",
            field="grpc-timeout",
        )
    return int(number) * _UNITS[unit]


def is_known_encoding(name: str) -> bool:
    return name in _ENCODINGS


def decompress(data: bytes, encoding: str, limit: int) -> bytes:
    """A compressed message. Raises InvalidArgument, or ResourceExhausted above `limit` bytes."""
    bits = _ENCODINGS.get(encoding)
    if bits is None:
        raise InvalidArgument("a message is marked as compressed, but grpc-encoding names nothing")
    reader = zlib.decompressobj(bits)
    try:
        plain = reader.decompress(data, limit + 1)
    except zlib.error as error:
        raise InvalidArgument(f"a message is not what {encoding} makes: {error}") from None
    if len(plain) > limit:
        raise too_long(limit)
    if not reader.eof:
        raise InvalidArgument(f"a message is not all that {encoding} made")
    return plain


def too_long(limit: int) -> ResourceExhausted:
    return ResourceExhausted(f"a message must be at most {limit} bytes long")
