"""Very many clients that do nothing: served or refused, and what each costs the gateway."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc, types_pb2
from services.gateway.connections import raise_file_limit
from tests.e2e.mesh import Mesh, running_mesh, wait_for

MODEL = "smollm2-135m"
#: The issue's bound, in bytes.
MAX_IDLE_STREAM = 40_000
#: As many as a worker serves at once.
NUM_STREAMS = 60


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    """A new one for each: what another freed would hide what is taken."""
    flags = ("--workers", "1", "--engine", "sim")
    # A token a second: streams that wait are idle.
    slow = {"HEADRACE_WORKER_SIM_STEP_MS": "1000"}
    with running_mesh(tmp_path, *flags, environment=slow) as mesh:
        yield mesh


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def ask_for_health(client: socket.socket) -> bytes:
    client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    return client.recv(4096)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_thousand_idle_connections_are_served_or_refused(mesh: Mesh) -> None:
    files = raise_file_limit()
    number = min(10_000, files - 1000)
    gateway = psutil.Process(mesh.pid("gateway"))
    most = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)[0]
    before, files_before = gateway.memory_full_info().uss, gateway.num_fds()
    with ExitStack() as stack:
        idle = [stack.enter_context(closing(connect(mesh.http))) for _ in range(number)]
        served = min(number, (most - 512) // 2)
        wait_for("the connections", lambda: gateway.num_fds() >= files_before + served, 120)
        each = (gateway.memory_full_info().uss - before) / served
        print(f"idle HTTP connection: {each:.0f} bytes")
        assert each < MAX_IDLE_STREAM
        assert ask_for_health(idle[0]).startswith(b"HTTP/1.1 200")
        late = stack.enter_context(closing(connect(mesh.http)))
        wanted = b"HTTP/1.1 200" if served == number else b"HTTP/1.1 503"
        try:
            assert ask_for_health(late).startswith(wanted)
        except ConnectionError:
            assert wanted.endswith(b"503"), "too many even to be told"
        channel = stack.enter_context(grpc.insecure_channel(mesh.grpc))
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        assert stub.ListModels(pb.ListModelsRequest(), timeout=60).models
    wait_for("room again", lambda: gateway.num_fds() <= files_before + 100, 60)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_idle_http_stream_costs_little(mesh: Mesh) -> None:
    gateway = psutil.Process(mesh.pid("gateway"))
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 500, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with ExitStack() as stack:
        before = gateway.memory_full_info().uss
        clients = [stack.enter_context(closing(connect(mesh.http))) for _ in range(NUM_STREAMS)]
        for client in clients:
            client.sendall((head + body).encode())
        for client in clients:
            while b"data: " not in (received := client.recv(4096)):
                assert received.startswith(b"HTTP/1.1 200"), received
        each = (gateway.memory_full_info().uss - before) / NUM_STREAMS
        print(f"open SSE stream: {each:.0f} bytes")
        assert each < MAX_IDLE_STREAM
    mesh.wait_idle()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_idle_grpc_stream_costs_little(mesh: Mesh) -> None:
    gateway = psutil.Process(mesh.pid("gateway"))
    sampling = types_pb2.SamplingParams(max_tokens=500)
    request = pb.GenerateRequest(model=MODEL, prompt="x", sampling=sampling)
    with ExitStack() as stack:
        before = gateway.memory_full_info().uss
        calls = []
        for _ in range(NUM_STREAMS):
            own = [("grpc.use_local_subchannel_pool", 1)]
            channel = stack.enter_context(grpc.insecure_channel(mesh.grpc, options=own))
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            calls.append(stub.Generate(request, timeout=120))
        for call in calls:
            next(call)
        each = (gateway.memory_full_info().uss - before) / NUM_STREAMS
        print(f"open gRPC stream, a connection each: {each:.0f} bytes")
        assert each < MAX_IDLE_STREAM
        for call in calls:
            call.cancel()
    mesh.wait_idle()
