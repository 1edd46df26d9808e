"""Dynamo serving on this machine: its frontend and its mocker's workers, nothing else.

No etcd, no NATS: discovery by files, requests over TCP, events over ZeroMQ. The
frontend tokenizes, routes by KV cache and detokenizes; the workers are one process.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.request import urlopen

from .processes import Processes, free_port, plain_environment

if TYPE_CHECKING:
    from pathlib import Path

_PLANES = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")


class DynamoMesh(Processes):
    """Workers and frontend. A context manager.

    `model` names the directory `model_path` for clients; `mocker_flags` go to the workers.
    """

    edge = ("frontend",)

    def __init__(
        self,
        python: Path,
        *,
        model: str,
        model_path: Path,
        num_workers: int,
        block_size: int,
        mocker_flags: list[str],
        folder: Path,
    ) -> None:
        super().__init__(folder)
        self.http = f"127.0.0.1:{free_port()}"
        self._python = python
        self._model = model
        self._block_size = str(block_size)
        self._mocker = [
            *("--model-path", str(model_path), "--model-name", model),
            *("--num-workers", str(num_workers), "--block-size", self._block_size, *mocker_flags),
        ]

    def _start(self) -> None:
        store = self._folder / "discovery"
        shutil.rmtree(store, ignore_errors=True)
        environment = plain_environment() | {
            "DYN_FILE_KV": str(store),
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_NAMESPACE": "benchmark",
            "DYN_LOG": "error",
        }
        host, _, port = self.http.rpartition(":")
        frontend = ["--http-host", host, "--http-port", port, "--router-mode", "kv"]
        frontend += ["--kv-cache-block-size", self._block_size]
        for name, module, flags in (
            ("workers", "mocker", self._mocker),
            ("frontend", "frontend", frontend),
        ):
            command = [str(self._python), "-P", "-m", f"dynamo.{module}", *flags, *_PLANES]
            self._run(name, command, env=environment)

    def _is_ready(self) -> bool:
        """Whether the frontend lists the model."""
        with suppress(OSError), urlopen(f"http://{self.http}/v1/models", timeout=1) as answer:
            return any(item["id"] == self._model for item in json.load(answer)["data"])
        return False
