"""`headrace.v1.TokenizerService`: messages in, work for the pool, messages out.

Nothing is tokenized here: the parent process only moves bytes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from headrace import telemetry
from headrace.blocks import TOKEN_LEN
from headrace.errors import HeadraceError, ResourceExhausted
from headrace.rpc.calls import CallServer, ServerCodec
from headrace.rpc.errors import abort
from headrace.rpc.options import FRAME_LEN, MAX_MESSAGE_LEN
from headrace.v1 import tokenizer_pb2 as pb
from headrace.v1 import tokenizer_pb2_grpc, types_pb2
from services.tokenizer import work
from services.tokenizer.convert import info_of, result_of, table_of, task_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from headrace.telemetry import Span
    from headrace.v1.tokenizer_pb2_grpc import _MaybeAsyncIterator, _ServicerContext
    from services.tokenizer.pool import Done, Pool

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TokenizerService"].full_name

#: What is left of a frame for a piece of a table.
_PIECE_LEN = FRAME_LEN - 64


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Serves `pool`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        #: Serialized tables, by model: they never change.
        self._tables: dict[str, bytes] = {}

    async def Tokenize(
        self,
        request_iterator: _MaybeAsyncIterator[pb.TokenizeRequest],
        context: _ServicerContext,
    ) -> AsyncIterator[pb.TokenizeResponse]:
        """One gateway's stream.

        Text that is no UTF-8 in one of protobuf's strings ends the stream: gRPC can't read
        its frame. Nobody else's calls are on it, and clients that may have such text send
        `text_utf8`, of which only the call fails.
        """
        server = CallServer(_Codec(), self._answer)
        try:
            async for frame in server.frames(request_iterator):
                yield frame
        except HeadraceError as error:
            await abort(context, error)

    async def Encode(
        self, request: pb.EncodeRequest, context: _ServicerContext
    ) -> pb.EncodeResponse:
        """See the proto."""
        result = await self._unary(pb.TokenizeCall(encode=request), context)
        return result.encode

    async def EncodeBatch(
        self, request: pb.EncodeBatchRequest, context: _ServicerContext
    ) -> pb.EncodeBatchResponse:
        """See the proto."""
        result = await self._unary(pb.TokenizeCall(encode_batch=request), context)
        return result.encode_batch

    async def Decode(
        self, request: pb.DecodeRequest, context: _ServicerContext
    ) -> pb.DecodeResponse:
        """See the proto."""
        result = await self._unary(pb.TokenizeCall(decode=request), context)
        return result.decode

    async def RenderChat(
        self, request: pb.RenderChatRequest, context: _ServicerContext
    ) -> pb.RenderChatResponse:
        """See the proto."""
        result = await self._unary(pb.TokenizeCall(render_chat=request), context)
        return result.render_chat

    async def GetDetokenizerTable(
        self, request: pb.GetDetokenizerTableRequest, context: _ServicerContext
    ) -> AsyncIterator[pb.GetDetokenizerTableResponse]:
        """See the proto."""
        try:
            table = await self._table(request.model)
        except HeadraceError as error:
            await abort(context, error)
        for start in range(0, len(table), _PIECE_LEN):
            yield pb.GetDetokenizerTableResponse(data=table[start : start + _PIECE_LEN])

    async def ListTokenizers(
        self, request: pb.ListTokenizersRequest, context: _ServicerContext
    ) -> pb.ListTokenizersResponse:
        """See the proto."""
        return pb.ListTokenizersResponse(tokenizers=map(info_of, self._pool.infos))

    async def _unary(self, call: pb.TokenizeCall, context: _ServicerContext) -> pb.TokenizeResult:
        metadata = dict(context.invocation_metadata() or ())
        call.traceparent = str(metadata.get("traceparent", ""))
        try:
            result = await self._answer(call)
            if result.ByteSize() > MAX_MESSAGE_LEN:
                raise ResourceExhausted(
                    f"the answer has {result.ByteSize():,} bytes, this call carries "
                    f"{MAX_MESSAGE_LEN:,}; use the stream"
                )
        # Everything becomes a status; what is unexpected is logged under an id.
        except Exception as error:  # noqa: BLE001
            await abort(context, error)
        return result

    async def _answer(self, call: pb.TokenizeCall) -> pb.TokenizeResult:
        name, item = task_of(call)
        timeout_s = call.timeout_ms / 1000 if call.timeout_ms else None
        if not telemetry.is_enabled():
            done = await self._pool.run(item, timeout_s=timeout_s)
            return result_of(call.id, done.answer)
        span = telemetry.start_span(name, call.traceparent, attributes={"model": item.model})
        try:
            done = await self._pool.run(item, timeout_s=timeout_s)
        except (HeadraceError, asyncio.CancelledError) as error:
            telemetry.end_with_error(span, type(error).__name__)
            raise
        _describe(span, done)
        span.end()
        return result_of(call.id, done.answer)

    async def _table(self, model: str) -> bytes:
        if model not in self._tables:
            done = await self._pool.run(work.ReadTable(model))
            self._tables[model] = table_of(done.answer)
        return self._tables[model]


class _Codec(
    ServerCodec[pb.TokenizeRequest, pb.TokenizeResponse, pb.TokenizeCall, pb.TokenizeResult]
):
    def calls(
        self, request: pb.TokenizeRequest
    ) -> tuple[Iterable[pb.TokenizeCall], Sequence[types_pb2.Chunk], Sequence[int]]:
        return request.calls, request.chunks, request.cancels

    def parse_call(self, data: bytes) -> pb.TokenizeCall:
        return pb.TokenizeCall.FromString(data)

    def has_more(self) -> bool:
        return False

    def response(
        self, results: list[pb.TokenizeResult], chunks: list[types_pb2.Chunk]
    ) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(results=results, chunks=chunks)

    def failure(self, call_id: int, error: types_pb2.Error) -> pb.TokenizeResult:
        return pb.TokenizeResult(id=call_id, error=error)


def _describe(span: Span, done: Done) -> None:
    span.set_attribute("queue_ms", done.queue_ms)
    span.set_attribute("work_ms", done.work_ms)
    if isinstance(done.answer, work.Encoded):
        span.set_attribute("tokens", len(done.answer.token_ids) // TOKEN_LEN)
