"""`inference.GRPCInferenceService` over a pipeline: protos in, protos out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace import __version__, telemetry
from headrace.errors import NotFound
from headrace.kserve import inference_pb2 as pb
from headrace.kserve.inference_pb2_grpc import GRPCInferenceServiceServicer
from headrace.rpc.errors import abort
from services.gateway.kserve import answer, options
from services.gateway.kserve.convert import response_to_proto
from services.gateway.kserve.stream import Call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from services.gateway.generation import Pipeline

    Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = "inference.GRPCInferenceService"

_Metadata = pb.ModelMetadataResponse.TensorMetadata
_INPUTS = [
    _Metadata(name=options.TEXT_INPUT, datatype="BYTES", shape=[1]),
    _Metadata(name="stream", datatype="BOOL", shape=[1]),
    _Metadata(name=options.SAMPLING_PARAMETERS, datatype="BYTES", shape=[1]),
    _Metadata(name="exclude_input_in_output", datatype="BOOL", shape=[1]),
    *(_Metadata(name=f, datatype="BOOL", shape=[1]) for f in options.EXTRA_OUTPUTS.values()),
]
_OUTPUTS = [
    _Metadata(name=options.TEXT_OUTPUT, datatype="BYTES", shape=[-1]),
    _Metadata(name="finish_reason", datatype="BYTES", shape=[-1]),
    _Metadata(name="num_input_tokens", datatype="UINT32", shape=[1]),
    _Metadata(name="num_output_tokens", datatype="UINT32", shape=[-1]),
]


class KServeServicer(GRPCInferenceServiceServicer):
    """The Open Inference Protocol v2 for text. `max_client_buffer_len`: bytes that may wait
    for a client that does not read; more cuts its call."""

    def __init__(self, pipeline: Pipeline, *, max_client_buffer_len: int) -> None:
        self._pipeline = pipeline
        self._max_client_buffer_len = max_client_buffer_len

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._pipeline.is_ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        is_ready = self._serves(request.name) and request.version in ("", options.VERSION)
        return pb.ModelReadyResponse(ready=is_ready and self._pipeline.is_ready())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="headrace", version=__version__, extensions=["parameters"]
        )

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        try:
            options.check_version(request.name, request.version)
            if not self._serves(request.name):
                raise NotFound(f"model {request.name!r} is not served here", field="name")
        except NotFound as error:
            await abort(context, error)
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[options.VERSION],
            platform="headrace",
            inputs=_INPUTS,
            outputs=_OUTPUTS,
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        call = self._call(context)
        try:
            sink = await call.infer(request, context.time_remaining())
            if sink.error is not None:
                raise sink.error
            return response_to_proto(answer.responses_of(sink)[0])
        except Exception as error:  # noqa: BLE001 - every failure gets its status
            await abort(context, error)
        finally:
            await call.close()

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        call = self._call(context)
        call.read(request_iterator, context.time_remaining)
        try:
            while not call.is_over:
                await call.outbox.wait()
                # When the client takes its time, the call may fail meanwhile.
                for response, error in call.take():
                    if call.error is not None:
                        break
                    yield pb.ModelStreamInferResponse(
                        error_message=error.message if error else "",
                        infer_response=response_to_proto(response),
                    )
            if call.error is not None:
                await abort(context, call.error)
        finally:
            await call.close()

    def _call(self, context: Context) -> Call:
        return Call(self._pipeline, self._max_client_buffer_len, _traceparent(context))

    def _serves(self, name: str) -> bool:
        return any(model.name == name for model in self._pipeline.models())


def _traceparent(context: Context) -> str:
    if not telemetry.is_enabled():
        return ""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent":
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return ""
