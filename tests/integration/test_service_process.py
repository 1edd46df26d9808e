"""A service's process: how it ends, what it says, what it loads, how a stopped one is noticed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace import status
from headrace.rpc import options

PRELUDE = """
import asyncio, sys
from headrace import service, status
from headrace.errors import StartupError
"""


def start(body: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_lets_it_finish(tmp_path: Path) -> None:
    process = start(
        """
async def main(stop):
    status.report("waiting")
    print("up", flush=True)
    await stop.wait()
    print("drained", flush=True)
sys.exit(service.run("example", "x", main))
""",
        HEADRACE_STATUS_FILE=str(tmp_path / "s"),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert status.read(tmp_path / "s") == status.Progress("waiting")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert out == "drained\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("StartupError('the port 1 is in use; choose another')", 2, "the port 1 is in use"),
        ("RuntimeError('boom')", 1, "unexpected error"),
    ],
)
def test_a_failed_start_says_why(tmp_path: Path, error: str, code: int, said: str) -> None:
    process = start(
        f"""
async def main(stop):
    raise {error}
sys.exit(service.run("example", "x", main))
""",
        HEADRACE_STATUS_FILE=str(tmp_path / "s"),
    )
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    progress = status.read(tmp_path / "s")
    assert progress is not None
    assert progress.phase.startswith(status.FAILED)
    assert said in progress.phase
    assert ("Traceback" in err) == (code == 1)


def test_without_an_endpoint_no_tracing_code_is_loaded() -> None:
    body = """
from headrace import telemetry
telemetry.setup("example", "x")
span = telemetry.start_span("a")
assert not telemetry.is_enabled()
assert not span.is_recording()
assert telemetry.traceparent(span) == ""
print([m for m in sys.modules if m.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""
    environment = {k: "" for k in os.environ if k.startswith("OTEL_")}
    out, err = start(body, **environment).communicate(timeout=20)
    assert out == "[]\n", err


def test_a_dead_collector_does_not_hold_up_the_end() -> None:
    body = """
import time
from headrace import telemetry
telemetry.setup("example", "x")
telemetry.start_span("a").end()
start = time.monotonic()
telemetry.shutdown()
print(time.monotonic() - start < 10)
"""
    process = start(body, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    out, err = process.communicate(timeout=60)
    assert out == "True\n", err


async def test_a_stopped_peer_is_noticed() -> None:
    """Rests on an internal channel option (headrace.rpc.options): without it this takes 60 s."""
    process = start(
        """
from headrace.rpc.server import Server
async def main(stop):
    server = Server("127.0.0.1:0", [])
    print(await server.start(), flush=True)
    await stop.wait()
    await server.stop()
sys.exit(service.run("example", "x", main))
"""
    )
    try:
        assert process.stdout is not None
        port = await asyncio.to_thread(process.stdout.readline)
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port.strip()}", options=options.CHANNEL
        ) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            process.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(20):
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await watch.read()
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        await asyncio.to_thread(process.communicate, timeout=20)
