"""A gateway process among real ones: tokenizer, router, two sim workers and a real Valkey.

Whatever is killed or stopped under a request, its tokens are those of an
undisturbed run: sim's are a pure function of the tokens before them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from headrace import status
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import router_pb2, types_pb2, worker_pb2
from headrace.v1.inference_pb2_grpc import InferenceServiceStub
from headrace.v1.router_pb2_grpc import RouterServiceStub
from headrace.v1.worker_pb2_grpc import WorkerServiceStub
from tests.integration.router_parts import Valkey, free_port, until

MODEL = "smollm2-135m"
PROMPT = "The mill stands at the end of the channel, where the water falls. " * 8
#: Tokens of an answer.
LEN = 300


class Service:
    """One service's process, started again at will on the same port."""

    def __init__(self, directory: Path, name: str, listen: str, *flags: str) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.command = [sys.executable, "-m", f"services.{name}", listen, self.address, *flags]
        self._base = directory / f"{name}-{port}"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        state = self._base.with_suffix(".status")
        state.unlink(missing_ok=True)
        with self._base.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                env={**os.environ, status.VARIABLE: str(state)},
            )
        return self.process

    def wait_ready(self) -> None:
        end = time.monotonic() + 60
        state = self._base.with_suffix(".status")
        while (progress := status.read(state)) is None or progress.phase != status.READY:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, f"{self._base.name}: {progress}\n{self.log()}"
            time.sleep(0.02)

    def log(self) -> str:
        return self._base.with_suffix(".log").read_text()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Mesh:
    """The processes, by role."""

    def __init__(self, directory: Path) -> None:
        self.valkey = Valkey()
        redis = ("--redis", self.valkey.url)
        model = ("--model", MODEL)
        sim = ("--engine", "sim", "--sim-step-ms", "5")
        self.tokenizer = Service(directory, "tokenizer", "--listen", *model, "--processes", "2")
        self.router = Service(directory, "router", "--listen", *redis)
        self.workers = [
            Service(directory, "worker", "--listen", *model, *sim, *redis, "--worker-id", name)
            for name in ("w0", "w1")
        ]
        peers = ("--tokenizer", self.tokenizer.address, "--router", self.router.address)
        http = ("--http", f"127.0.0.1:{free_port()}")
        self.gateway = Service(directory, "gateway", "--grpc", *peers, *http)
        for service in self.services():
            service.wait_ready()

    def services(self) -> list[Service]:
        return [self.tokenizer, self.router, *self.workers, self.gateway]

    def stop(self) -> None:
        for service in self.services():
            service.kill()
        self.valkey.stop()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, smollm2: Any) -> Iterator[Mesh]:
    mesh = Mesh(tmp_path_factory.mktemp("mesh"))
    yield mesh
    mesh.stop()


@pytest.fixture
async def stub(mesh: Mesh) -> Any:
    async with grpc.aio.insecure_channel(mesh.gateway.address) as channel:
        stub: Any = InferenceServiceStub(channel)
        end = time.monotonic() + 20
        # What the test before took away is back.
        while await num_workers(stub) != [2]:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        yield stub


async def num_workers(stub: Any) -> list[int]:
    answer = await stub.ListModels(pb.ListModelsRequest())
    return [model.num_workers for model in answer.models]


class Answer:
    """What a request brought so far."""

    def __init__(self, stub: Any, prompt: str, max_tokens: int = LEN) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.usage: Any = None
        sampling = types_pb2.SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
        request = pb.GenerateRequest(model=MODEL, prompt=prompt, sampling=sampling)
        self._reading = asyncio.create_task(self._read(stub.Generate(request)))

    async def done(self) -> Answer:
        return await asyncio.wait_for(self._reading, 60)

    async def has(self, num_tokens: int) -> None:
        await until(f"{num_tokens} tokens", lambda: len(self.token_ids) >= num_tokens)

    async def equals(self, other: Answer) -> None:
        """Once it is complete."""
        await self.done()
        assert self.token_ids == other.token_ids
        assert self.text == other.text
        assert self.usage.completion_tokens == LEN

    async def _read(self, call: Any) -> Answer:
        async for response in call:
            self.text += response.text
            self.token_ids += response.token_ids
            if response.HasField("usage"):
                self.usage = response.usage
        return self


async def in_its_middle(stub: Any, prompt: str) -> tuple[Answer, Answer]:
    """An undisturbed answer, and the same one on its way."""
    undisturbed = await Answer(stub, prompt).done()
    answer = Answer(stub, prompt)
    await answer.has(40)
    return undisturbed, answer


async def busy_worker(mesh: Mesh) -> Service:
    """The one that serves the only request."""
    busy = []
    for worker in mesh.workers:
        async with grpc.aio.insecure_channel(worker.address) as channel:
            stub: Any = WorkerServiceStub(channel)
            answer = await stub.GetWorker(worker_pb2.GetWorkerRequest())
        if answer.load.active_sequences:
            busy.append(worker)
    assert len(busy) == 1
    return busy[0]


async def test_a_prompt_sent_twice_is_found_in_the_cache(stub: Any) -> None:
    first = await Answer(stub, "twice " + PROMPT, 8).done()
    second = await Answer(stub, "twice " + PROMPT, 8).done()
    assert first.token_ids == second.token_ids
    assert len(first.token_ids) == 8
    assert first.usage.prompt_tokens > 100
    assert second.usage.cached_tokens >= first.usage.prompt_tokens - 32


async def test_a_killed_worker(mesh: Mesh, stub: Any) -> None:
    undisturbed, answer = await in_its_middle(stub, "kill " + PROMPT)
    busy = await busy_worker(mesh)
    busy.kill()
    await answer.equals(undisturbed)
    busy.start()
    busy.wait_ready()


async def test_a_stopped_worker(mesh: Mesh, stub: Any) -> None:
    undisturbed, answer = await in_its_middle(stub, "stop " + PROMPT)
    busy = await busy_worker(mesh)
    busy.send(signal.SIGSTOP)
    try:
        await answer.equals(undisturbed)
    finally:
        busy.send(signal.SIGCONT)


async def test_killed_router_and_tokenizer(mesh: Mesh, stub: Any) -> None:
    undisturbed, answer = await in_its_middle(stub, "router " + PROMPT)
    mesh.router.kill()
    mesh.tokenizer.kill()
    waiting = Answer(stub, "router " + PROMPT)
    mesh.tokenizer.start()
    await answer.equals(undisturbed)
    await waiting.equals(undisturbed)
    assert "falling back" in mesh.gateway.log()
    mesh.router.start()
    mesh.router.wait_ready()
    mesh.tokenizer.wait_ready()


async def test_a_router_that_returns_without_redis(mesh: Mesh, stub: Any) -> None:
    """It knows no worker, and must not take from the gateway those that it knows."""
    undisturbed = await Answer(stub, "blank " + PROMPT).done()
    mesh.valkey.stop()
    mesh.router.kill()
    mesh.router.start()
    try:

        async def answers() -> bool:
            async with grpc.aio.insecure_channel(mesh.router.address) as channel:
                try:
                    await RouterServiceStub(channel).GetFleet(router_pb2.GetFleetRequest())
                except grpc.aio.AioRpcError:
                    return False
                return True

        end = time.monotonic() + 30
        while not await answers():
            assert time.monotonic() < end
        for _ in range(5):
            assert await num_workers(stub) == [2]
            await Answer(stub, "blank " + PROMPT).equals(undisturbed)
    finally:
        mesh.valkey.start()
    mesh.router.wait_ready()


async def test_sigterm_drains_the_gateway(mesh: Mesh, stub: Any) -> None:
    undisturbed, answer = await in_its_middle(stub, "drain " + PROMPT)
    mesh.gateway.send(signal.SIGTERM)
    await answer.equals(undisturbed)
    assert await asyncio.to_thread(mesh.gateway.process.wait, 20) == 0
    mesh.gateway.start()
    mesh.gateway.wait_ready()


def test_a_port_in_use_is_one_clear_line(mesh: Mesh) -> None:
    command = [*mesh.gateway.command, "--http", "127.0.0.1:0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert f"can't listen on {mesh.gateway.address}" in ended.stderr
