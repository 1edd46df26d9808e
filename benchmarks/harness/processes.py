"""Processes that a benchmark starts and ends, and the CPU time that each of them uses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

_START_S = 60.0
_STOP_S = 15.0


class Processes:
    """Named processes, all gone when the context ends. Logs are in `folder`.

    Subclasses start theirs in `_start`, and wait in `_is_ready` until they serve.
    """

    #: Those that stand between clients and workers.
    edge: tuple[str, ...] = ()
    #: Where HTTP clients connect.
    http = ""

    def __init__(self, folder: Path) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._folder = folder

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
            self._wait(self._is_ready)
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
        """Seconds of CPU that each has used so far, its children included."""
        return {name: tree_cpu_s(process.pid) for name, process in self.processes.items()}

    def stop(self) -> None:
        """End all, the last started first."""
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def _start(self) -> None:
        """Start them all."""
        raise NotImplementedError

    def _is_ready(self) -> bool:
        """Whether clients would be served."""
        raise NotImplementedError

    def _run(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        cwd: Path | None = None,
    ) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(env)
            )

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        """Until it is. Raises RuntimeError naming the log to read."""
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended: see {self._folder / name}.log")
            if is_ready():
                return
            time.sleep(0.05)
        raise RuntimeError(f"not ready after {_START_S} s: see {self._folder}")


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


def plain_environment() -> dict[str, str]:
    """Ours, without what only our own processes are told by it."""
    return {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
