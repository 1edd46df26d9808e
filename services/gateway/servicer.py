"""The gRPC edge: protos in, protos out. What a request means is the pipeline's matter."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from headrace import telemetry
from headrace.errors import InvalidArgument
from headrace.rpc.errors import abort, from_exception, to_proto
from headrace.v1 import inference_pb2 as pb
from headrace.v1.inference_pb2_grpc import InferenceServiceServicer
from services.gateway import response_bytes, tracing
from services.gateway.call_sink import CallSink
from services.gateway.convert import model_info, parse_request, with_client_s_field
from services.gateway.ids import new_request_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.gateway.generation import Pipeline, Usage
    from services.gateway.h2.call import ServerCall

SERVICE_NAME = "headrace.v1.InferenceService"

MAX_BATCH = 256
MAX_EMBED_INPUTS = 2048


class InferenceServicer(InferenceServiceServicer):
    """`InferenceService` over a pipeline, for an `EdgeServer`."""

    def __init__(self, pipeline: Pipeline, *, max_client_buffer_len: int) -> None:
        self._pipeline = pipeline
        self._max_client_buffer_len = max_client_buffer_len

    # Overrides what is declared as a generator of messages: these write bytes, see call_sink.

    async def Generate(  # type: ignore[override]
        self, request: pb.GenerateRequest, context: ServerCall
    ) -> None:
        def sinks(sink: CallSink) -> None:
            context.on_drained = sink.on_drained

        try:
            await self._generate(request, context, context.send, sinks)
        except Exception as error:  # noqa: BLE001 - every failure gets its status
            await abort(context, with_client_s_field(from_exception(error)))  # type: ignore[arg-type]

    async def GenerateBatch(  # type: ignore[override]
        self, request: pb.GenerateBatchRequest, context: ServerCall
    ) -> None:
        if not 1 <= len(request.requests) <= MAX_BATCH:
            text = f"requests must hold 1 to {MAX_BATCH} requests, not {len(request.requests)}"
            await abort(context, InvalidArgument(text, field="requests"))  # type: ignore[arg-type]
        sinks: list[CallSink] = []

        def drained() -> None:
            for sink in sinks:
                sink.on_drained()

        context.on_drained = drained
        async with asyncio.TaskGroup() as group:
            for number, one in enumerate(request.requests):
                group.create_task(self._one_of_batch(number, one, context, sinks))

    async def _one_of_batch(
        self, number: int, request: pb.GenerateRequest, call: ServerCall, sinks: list[CallSink]
    ) -> None:
        """One request of a batch: its responses, or its error; never an exception."""
        prefix = response_bytes.batch_prefix(number)

        def send(message: bytes) -> None:
            call.send(response_bytes.in_batch(prefix, message))

        try:
            await self._generate(request, call, send, sinks.append)
        except Exception as error:  # noqa: BLE001 - becomes the request's error
            ours = with_client_s_field(from_exception(error), f"requests[{number}].")
            call.send(response_bytes.batch_error(number, to_proto(ours)))

    async def _generate(
        self,
        request: pb.GenerateRequest,
        call: ServerCall,
        send: Callable[[bytes], None],
        note: Callable[[CallSink], None],
    ) -> None:
        """Write all of a request's responses with `send`. Raises its error."""
        span = tracing.request_span(traceparent=_traceparent(call))
        outcome: Usage | BaseException = asyncio.CancelledError()
        sink: CallSink | None = None
        try:
            parsed = parse_request(request, new_request_id(), call.time_remaining())
            if telemetry.is_enabled():
                tracing.describe(span, parsed)
                if request.user:
                    span.set_attribute("headrace.user", request.user)
            sink = CallSink(
                parsed,
                call,
                self._max_client_buffer_len,
                send=send,
                with_texts=request.return_token_texts,
            )
            note(sink)
            sink.generation = await self._pipeline.start(parsed, sink, span)
            await sink.over
            if sink.error is not None:
                raise sink.error
            outcome = sink.usage or outcome
        except Exception as error:
            outcome = from_exception(error)
            raise outcome from error
        finally:
            # Also when the client left: the engine must not go on.
            if sink is not None:
                sink.close()
            tracing.finish(span, outcome)

    async def Embed(  # type: ignore[override]
        self, request: pb.EmbedRequest, context: ServerCall
    ) -> pb.EmbedResponse:
        try:
            _check_embed(request)
            self._pipeline.check_serves(request.model, "embedding")
        except Exception as error:  # noqa: BLE001 - every failure gets its status
            await abort(context, from_exception(error))  # type: ignore[arg-type]
        text = f"no worker serves embeddings for {request.model}"
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)

    async def ListModels(  # type: ignore[override]
        self, request: pb.ListModelsRequest, context: ServerCall
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=map(model_info, self._pipeline.models()))


def _check_embed(request: pb.EmbedRequest) -> None:
    if not request.model:
        raise InvalidArgument("model must be named", field="model")
    if not 1 <= len(request.inputs) <= MAX_EMBED_INPUTS:
        raise InvalidArgument(
            f"inputs must hold 1 to {MAX_EMBED_INPUTS} inputs, not {len(request.inputs)}",
            field="inputs",
        )
    for index, one in enumerate(request.inputs):
        if not (one.text or one.token_ids.ids):
            raise InvalidArgument(f"inputs[{index}] must not be empty", field=f"inputs[{index}]")
    if request.HasField("dimensions") and not request.dimensions:
        raise InvalidArgument("dimensions must be 1 or more, not 0", field="dimensions")


def _traceparent(call: ServerCall) -> str:
    if not telemetry.is_enabled():
        return ""
    for key, value in call.invocation_metadata():
        if key == "traceparent":
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return ""
