"""`python -m services.router`: how it starts, what it says, how it ends, what it traces."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from headrace import status
from headrace.v1 import router_pb2, router_pb2_grpc
from tests.integration.router_parts import (
    MODEL,
    FakeWorker,
    Valkey,
    free_port,
    prompt,
    until,
)

ROOT = Path(__file__).parents[2]


def start(flags: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "services.router", *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


@asynccontextmanager
async def running(
    tmp_path: Path, url: str, **environment: str
) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    address = f"127.0.0.1:{free_port()}"
    status_file = tmp_path / "status"
    environment["HEADRACE_STATUS_FILE"] = str(status_file)
    process = start(["--listen", address, "--redis", url], environment)
    try:
        await until("it is ready", lambda: status.read(status_file) == status.Progress("ready"))
        yield process, address
    finally:
        process.kill()
        process.communicate()


async def test_it_serves_and_ends_on_sigterm(tmp_path: Path, valkey: Valkey) -> None:
    async with (
        running(tmp_path, valkey.url) as (process, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = router_pb2_grpc.RouterServiceStub(channel)
        fleet = await stub.GetFleet(router_pb2.GetFleetRequest(), timeout=10)
        assert fleet.policy == "kv"
        # A stream that is open does not hold it back.
        stream = stub.Route()
        await stream.write(router_pb2.RouteRequest(open=router_pb2.RouteOpen(gateway_id="g")))
        assert (await stream.read()).HasField("fleet")
        process.send_signal(signal.SIGTERM)
        _, said = await asyncio.to_thread(process.communicate, timeout=20)
        stream.cancel()
    assert process.returncode == 0, said
    assert "Traceback" not in said


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """A real OTLP receiver."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    async def Export(
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_a_decision_is_a_span_of_the_call_that_asked(tmp_path: Path, valkey: Valkey) -> None:
    receiver, server = Receiver(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    worker = await FakeWorker(valkey.url, "one").start()
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    async with (
        running(tmp_path, valkey.url, **settings) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stream = router_pb2_grpc.RouterServiceStub(channel).Route()
        await stream.write(router_pb2.RouteRequest(open=router_pb2.RouteOpen(gateway_id="g")))
        while not (await stream.read()).fleet.models[0].workers:
            pass
        trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        for call_id, model in ((1, MODEL.name), (2, "unknown")):
            select = router_pb2.SelectWorkerRequest(
                model=model, block_ids=prompt(64), num_tokens=64, num_sequences=1
            )
            traceparent = f"00-{trace_id}-{span_id}-01"
            call = router_pb2.RouteCall(id=call_id, traceparent=traceparent, select=select)
            await stream.write(router_pb2.RouteRequest(calls=[call]))
        await until("both spans came", lambda: len(receiver.spans) == 2)
        stream.cancel()
    await worker.close()
    await server.stop(0)
    good, bad = receiver.spans
    for span in receiver.spans:
        assert span.name == "router.select"
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace_id, span_id)
    values = {pair.key: pair.value for pair in good.attributes}
    assert values["policy"].string_value == "kv"
    assert values["worker"].string_value == "one"
    assert values["matched_tokens"].int_value == 0
    assert values["candidates"].int_value == 1
    (parts,) = json.loads(values["parts"].string_value).values()
    assert parts["prefill"] > 0
    assert values["predicted_ttft_ms"].double_value > 0
    assert "unknown" in bad.status.message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--redis", "http://localhost"], "--redis"),
        (["--listen", "nowhere"], "HOST:PORT"),
        (["--policy", "clairvoyant"], "clairvoyant"),
    ],
)
def test_bad_settings_are_one_line(flags: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.router", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_one_line(server: Valkey) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "services.router", "--listen", address, "--redis", server.url],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert f"can't listen on {address}" in done.stderr
    assert "Traceback" not in done.stderr
