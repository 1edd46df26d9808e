"""The gRPC edge: protos in, protos out. What a request means is the pipeline's matter."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from headrace import telemetry
from headrace.errors import InvalidArgument
from headrace.logprobs import unpack
from headrace.rpc.convert import sampling_from_proto
from headrace.rpc.errors import abort, from_exception
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2
from headrace.v1.inference_pb2_grpc import InferenceServiceServicer
from services.gateway import tracing
from services.gateway.call_sink import CallSink
from services.gateway.generation import ChatMessage, GenerationRequest
from services.gateway.ids import new_request_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from services.gateway.generation import EndReason, Pipeline, ServedModel, Usage

    Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = "headrace.v1.InferenceService"

_FINISH_REASONS: dict[EndReason, types_pb2.FinishReason.ValueType] = {
    "stop": types_pb2.FINISH_REASON_STOP,
    "length": types_pb2.FINISH_REASON_LENGTH,
}


class InferenceServicer(InferenceServiceServicer):
    """`InferenceService` over a pipeline."""

    def __init__(self, pipeline: Pipeline, *, max_client_buffer_len: int) -> None:
        self._pipeline = pipeline
        self._max_client_buffer_len = max_client_buffer_len

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        span = tracing.request_span(traceparent=_traceparent(context))
        sink = CallSink(self._max_client_buffer_len)
        outcome: Usage | BaseException = asyncio.CancelledError()
        try:
            parsed = parse_request(request, new_request_id(), context.time_remaining())
            if telemetry.is_enabled():
                tracing.describe(span, parsed)
            sink.generation = await self._pipeline.start(parsed, sink, span)
            is_over = False
            while not is_over:
                await sink.wait()
                # Read before taking: more may come while the client takes its time.
                is_over = sink.is_over
                for response in _responses(parsed, sink):
                    yield response
            if sink.error is not None:
                raise sink.error
            outcome = sink.usage or outcome
        except Exception as error:  # noqa: BLE001 - every failure gets its status
            outcome = from_exception(error)
            await abort(context, outcome)
        finally:
            # Also when the client left: the engine must not go on.
            if sink.generation is not None:
                sink.generation.cancel()
            tracing.finish(span, outcome)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=map(_model_info, self._pipeline.models()))


def parse_request(
    request: pb.GenerateRequest, request_id: str, timeout_s: float | None
) -> GenerationRequest:
    """The request in our own terms; the pipeline checks the values. Raises InvalidArgument."""
    given = request.WhichOneof("input")
    if given is None:
        raise InvalidArgument("one of prompt, chat and token_ids must be given", field="prompt")
    chat = tuple(ChatMessage(m.role, m.content) for m in request.chat.messages)
    return GenerationRequest(
        request_id=request_id,
        model=request.model,
        prompt=request.prompt if given == "prompt" else None,
        messages=chat if given == "chat" else None,
        token_ids=tuple(request.token_ids.ids) if given == "token_ids" else None,
        sampling=sampling_from_proto(request.sampling),
        n=request.n if request.HasField("n") else 1,
        stop=tuple(request.stop),
        timeout_s=timeout_s,
    )


def _responses(request: GenerationRequest, sink: CallSink) -> list[pb.GenerateResponse]:
    """All that waits, one response per sequence; the usage on the call's last."""
    responses = [
        pb.GenerateResponse(
            request_id=request.request_id,
            index=index,
            text="".join(pending.text),
            token_ids=pending.token_ids,
            logprobs=_logprobs(pending.logprobs, request.sampling.logprobs),
            prompt_logprobs=_logprobs(pending.prompt_logprobs, request.sampling.prompt_logprobs),
            finish_reason=_FINISH_REASONS[pending.reason]
            if pending.reason
            else types_pb2.FINISH_REASON_UNSPECIFIED,
        )
        for index, pending in sink.take().items()
    ]
    if sink.usage is not None:
        if not responses:
            responses.append(pb.GenerateResponse(request_id=request.request_id))
        responses[-1].usage.CopyFrom(_usage(sink.usage))
    return responses


def _logprobs(data: bytearray, count: int | None) -> list[pb.TokenLogprobs]:
    if not data:
        return []
    return [
        pb.TokenLogprobs(chosen=_logprob(record.chosen), top=map(_logprob, record.top))
        for record in unpack(data, count or 0)
    ]


def _logprob(entry: tuple[int, float]) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=entry[0], logprob=entry[1])


def _usage(usage: Usage) -> types_pb2.Usage:
    return types_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _model_info(model: ServedModel) -> pb.ModelInfo:
    card = types_pb2.ModelCard(
        name=model.name,
        revision=model.revision,
        tokenizer_digest=model.tokenizer_digest,
        context_len=model.context_len,
        block_size=model.block_size,
        modalities=model.modalities,
        created=model.created,
    )
    return pb.ModelInfo(card=card, num_workers=model.num_workers)


def _traceparent(context: Context) -> str:
    if not telemetry.is_enabled():
        return ""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent":
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return ""
