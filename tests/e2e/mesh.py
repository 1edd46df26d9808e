"""A whole mesh, started as a user starts it, and an OTLP receiver to put beside it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from headrace.v1 import router_pb2, router_pb2_grpc

HEADRACE = str(Path(sys.executable).parent / "headrace")
T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(what: str, probe: Callable[[], T | None], timeout_s: float = 30) -> T:
    """What `probe` returns, once that is true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if got := probe():
            return got
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s} s for {what}")


@dataclass(frozen=True)
class SeenSpan:
    """One exported span."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: tuple[str, ...]
    start_ns: int
    end_ns: int


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP/gRPC trace receiver that keeps what it gets."""

    def __init__(self) -> None:
        self.port = 0
        self.spans: list[SeenSpan] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> Any:
        with self._lock:
            for resource in request.resource_spans:
                service = _attributes(resource.resource.attributes)["service.name"]
                for scope in resource.scope_spans:
                    self.spans.extend(_seen(service, span) for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> list[SeenSpan]:
        with self._lock:
            return [s for s in self.spans if s.trace_id == trace_id]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {p.key: getattr(p.value, p.value.WhichOneof("value")) for p in pairs}


def _seen(service: str, span: Any) -> SeenSpan:
    return SeenSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=_attributes(span.attributes),
        events=tuple(e.name for e in span.events),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
    )


@dataclass
class Mesh:
    """A running mesh."""

    state: Path
    http: str
    grpc: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def command(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [HEADRACE, *arguments],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
            **options,
        )

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json", "--state-dir", str(self.state))
        parsed: dict[str, Any] = json.loads(done.stdout)
        return parsed

    def pid(self, name: str) -> int:
        pid: int = next(p["pid"] for p in self.status()["processes"] if p["name"] == name)
        return pid

    def fleet(self) -> list[router_pb2.WorkerState]:
        """The router's view of the workers."""
        address = next(p["address"] for p in self.status()["processes"] if p["name"] == "router")
        with grpc.insecure_channel(address) as channel:
            stub: Any = router_pb2_grpc.RouterServiceStub(channel)
            models = stub.GetFleet(router_pb2.GetFleetRequest(), timeout=10).models
        return [worker for model in models for worker in model.workers]

    def wait_idle(self) -> None:
        """Until no engine holds a sequence, and the router knows it."""
        wait_for(
            "idle engines",
            lambda: all(
                w.active_sequences == w.queued_sequences == w.reservations == 0
                for w in self.fleet()
            ),
        )


@contextmanager
def running_mesh(state: Path, *flags: str, environment: dict[str, str]) -> Iterator[Mesh]:
    mesh = Mesh(state, f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", environment)
    started = mesh.command(
        "up",
        "--detach",
        "--state-dir",
        str(state),
        "--http",
        mesh.http,
        "--grpc",
        mesh.grpc,
        *flags,
    )
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield mesh
    finally:
        mesh.command("down", "--state-dir", str(state))
