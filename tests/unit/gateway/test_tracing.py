"""What a gateway's process exports of a request, to a real OTLP receiver."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2
from headrace.v1.inference_pb2_grpc import InferenceServiceStub

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Any] = []

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def one(self, name: str) -> Any:
        (span,) = [span for span in self.spans if span.name == name]
        return span


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[Receiver, int]]:
    server = grpc.aio.server()
    receiver = Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield receiver, port
    await server.stop(0)


async def start_gateway(mesh: Any, otlp_port: int) -> tuple[Any, str]:
    """A gateway's process on free ports, and its gRPC address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0",
        "--tokenizer", f"127.0.0.1:{mesh.tokenizer_port}",
        "--router", f"127.0.0.1:{mesh.router_port}",
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{otlp_port}"},
    )  # fmt: skip
    port = ""
    while "ready: serving bytes" not in (line := (await process.stderr.readline()).decode()):
        assert line, "the gateway ended"
        if found := re.search(r"grpc (\d+)", line):
            port = found[1]
    return process, f"127.0.0.1:{port}"


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


async def test_one_request_is_one_trace(mesh: Any, receiver: tuple[Receiver, int]) -> None:
    spans, otlp_port = receiver
    await mesh.start_peers(num_workers=1)
    process, address = await start_gateway(mesh, otlp_port)
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
    sampling = types_pb2.SamplingParams(max_tokens=4)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceServiceStub(channel)
        request = pb.GenerateRequest(model="bytes", prompt="hello", sampling=sampling)
        assert [r async for r in stub.Generate(request, metadata=metadata)]
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0

    request_span = spans.one("headrace.generate")
    assert request_span.trace_id.hex() == TRACE
    assert request_span.parent_span_id.hex() == PARENT
    assert request_span.kind == Span.SPAN_KIND_SERVER
    assert [event.name for event in request_span.events] == ["first_token"]
    noted = attributes(request_span)
    assert noted["gen_ai.request.model"] == "bytes"
    assert noted["gen_ai.usage.input_tokens"] == 5
    assert noted["gen_ai.usage.output_tokens"] == 4
    for stage in ("tokenize", "route"):
        assert spans.one(stage).parent_span_id == request_span.span_id
        assert spans.one(stage).trace_id == request_span.trace_id
    # The next processes hang theirs below ours.
    ids = {"tokenize": mesh.tokenizer.encodes[0], "route": mesh.router.calls[0]}
    for stage, call in ids.items():
        assert call.traceparent == f"00-{TRACE}-{spans.one(stage).span_id.hex()}-01"
    submitted = mesh.workers[0].submissions[0].traceparent
    assert submitted == f"00-{TRACE}-{request_span.span_id.hex()}-01"


async def test_failures_are_marked(mesh: Any, receiver: tuple[Receiver, int]) -> None:
    spans, otlp_port = receiver
    await mesh.start_peers(num_workers=1)
    process, address = await start_gateway(mesh, otlp_port)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            [r async for r in stub.Generate(pb.GenerateRequest(model="gpt-9", prompt="hello"))]
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
    span = spans.one("headrace.generate")
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes(span)["error.type"] == "NotFound"
    assert "hello" not in str(span)
