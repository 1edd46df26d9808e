"""vllm-router, a proxy written in Rust, in an environment of its own, before mock workers.

It routes by the longest prefix that it has seen, and neither tokenizes nor detokenizes.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

from .processes import Processes, free_port, plain_environment

VLLM_ROUTER = "0.1.17"
_WORKER = Path(__file__).with_name("mock_worker.py")


def install_proxy(folder: Path) -> Path:
    """The Python of an environment with the proxy, made if it is not there yet."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.exists() and done.read_text() == VLLM_ROUTER:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", f"vllm-router=={VLLM_ROUTER}"]
    subprocess.run(command, check=True)
    done.write_text(VLLM_ROUTER)
    return python


class ProxyMesh(Processes):
    """Mock workers and the proxy. A context manager."""

    edge = ("proxy",)

    def __init__(
        self, python: Path, *, model: str, num_workers: int, step_ms: float, folder: Path
    ) -> None:
        super().__init__(folder)
        self.http = f"127.0.0.1:{free_port()}"
        self._python = python
        self._model = model
        self._step_ms = str(step_ms)
        self._ports = [str(free_port()) for _ in range(num_workers)]
        self._metrics_port = str(free_port())

    def _start(self) -> None:
        environment = plain_environment()
        for index, port in enumerate(self._ports):
            command = [sys.executable, "-P", str(_WORKER), port, self._step_ms, self._model]
            self._run(f"worker-{index}", command, env=environment)
        host, _, port = self.http.rpartition(":")
        urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        command = [str(self._python), "-P", "-m", "vllm_router.launch_router"]
        command += ["--host", host, "--port", port, "--policy", "cache_aware"]
        command += ["--prometheus-port", self._metrics_port, "--log-level", "error"]
        self._run("proxy", [*command, "--worker-urls", *urls], env=environment)

    def _is_ready(self) -> bool:
        with suppress(OSError), urlopen(f"http://{self.http}/v1/models", timeout=1) as answer:
            return self._model in answer.read().decode()
        return False
