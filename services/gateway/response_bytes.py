"""GenerateResponses as bytes, encoded by hand: it is done for every token.

The same bytes as protobuf's own encoding (https://protobuf.dev/programming-guides/encoding/);
`plain` is the twin that says so, and a test holds that both agree. It knows no call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.logprobs import unpack
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.gateway.generation import EndReason, Usage

FINISH_REASONS: dict[EndReason, types_pb2.FinishReason.ValueType] = {
    "stop": types_pb2.FINISH_REASON_STOP,
    "length": types_pb2.FINISH_REASON_LENGTH,
}

#: The keys of fields: number << 3 | wire type.
_TEXT, _TOKEN_IDS = b"\x1a", b"\x22"
_BATCH_RESPONSE = b"\x12"


def varint(value: int) -> bytes:
    """An unsigned integer, 7 bits a byte, lowest first."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    if value < 0x200000:
        return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def prefix(request_id: str, index: int) -> bytes:
    """What all responses of a sequence begin with."""
    return pb.GenerateResponse(request_id=request_id, index=index).SerializeToString()


def delta(prefix: bytes, text: str, token_ids: Sequence[int]) -> bytes:
    """A response with text and tokens only."""
    out = prefix
    if text:
        data = text.encode()
        out += _TEXT + varint(len(data)) + data
    if token_ids:
        ids = varint(token_ids[0]) if len(token_ids) == 1 else b"".join(map(varint, token_ids))
        out += _TOKEN_IDS + varint(len(ids)) + ids
    return out


def plain(request_id: str, index: int, text: str, token_ids: Sequence[int]) -> bytes:
    """The same by protobuf itself."""
    return pb.GenerateResponse(
        request_id=request_id, index=index, text=text, token_ids=token_ids
    ).SerializeToString()


def rest(
    *,
    reason: EndReason | None = None,
    usage: Usage | None = None,
    logprobs: Sequence[pb.TokenLogprobs] = (),
    prompt_logprobs: Sequence[pb.TokenLogprobs] = (),
) -> bytes:
    """The fields that most responses lack: put behind the others, they complete a message."""
    response = pb.GenerateResponse(logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    if reason is not None:
        response.finish_reason = FINISH_REASONS[reason]
    if usage is not None:
        response.usage.prompt_tokens = usage.prompt_tokens
        response.usage.completion_tokens = usage.completion_tokens
        response.usage.cached_tokens = usage.cached_tokens
    return response.SerializeToString()


def logprobs(
    data: bytes | bytearray, count: int | None, spelled: Callable[[int], bytes] | None
) -> list[pb.TokenLogprobs]:
    """Packed records (see headrace.logprobs) with the `count` likeliest of each token.

    With `spelled` each has its token's bytes too.
    """

    def entry(of: tuple[int, float]) -> pb.TokenLogprob:
        text = spelled(of[0]) if spelled is not None else b""
        return pb.TokenLogprob(token_id=of[0], logprob=of[1], text=text)

    return [
        pb.TokenLogprobs(chosen=entry(record.chosen), top=map(entry, record.top))
        for record in unpack(data, count or 0)
    ]


def batch_prefix(request_index: int) -> bytes:
    """What all of a request's responses in a batch begin with."""
    return pb.GenerateBatchResponse(request_index=request_index).SerializeToString()


def in_batch(batch_prefix: bytes, response: bytes) -> bytes:
    """A GenerateBatchResponse that holds a serialized GenerateResponse."""
    return batch_prefix + _BATCH_RESPONSE + varint(len(response)) + response


def batch_error(request_index: int, error: types_pb2.Error) -> bytes:
    return pb.GenerateBatchResponse(request_index=request_index, error=error).SerializeToString()
