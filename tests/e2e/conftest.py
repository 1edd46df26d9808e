"""Meshes that end-to-end tests share; starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from tests.e2e.mesh import Mesh, Receiver, running_mesh


@pytest.fixture(scope="session")
def receiver() -> Iterator[Receiver]:
    server = grpc.server(ThreadPoolExecutor(4))
    servicer = Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    servicer.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer
    server.stop(None)


@pytest.fixture(scope="session")
def tracing(receiver: Receiver) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }


@pytest.fixture(scope="session")
def torch_mesh(tmp_path_factory: pytest.TempPathFactory, tracing: dict[str, str]) -> Iterator[Mesh]:
    """The default model on two torch workers, traced."""
    flags = ("--workers", "2", "--engine", "torch")
    with running_mesh(tmp_path_factory.mktemp("torch"), *flags, environment=tracing) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def sim_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two sim workers."""
    flags = ("--workers", "2", "--engine", "sim")
    with running_mesh(tmp_path_factory.mktemp("sim"), *flags, environment={}) as mesh:
        yield mesh
