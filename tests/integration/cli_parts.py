"""Small real programs for a supervisor to keep, and a supervisor in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from headrace.supervisor import StateDir
from headrace.supervisor.policy import Role
from headrace.supervisor.state import MeshState

T = TypeVar("T")
HEADRACE = str(Path(sys.executable).with_name("headrace"))

#: What a kept program runs: it answers PING on its port until SIGTERM, unless its
#: behaviour is another.
CHILD = """
import os, signal, socket, subprocess, sys
name, port, behaviour, folder = sys.argv[1:]
if behaviour == "misconfigured":
    open(os.environ["HEADRACE_STATUS_FILE"], "w").write("\\tfailed: no such model: x\\n")
    sys.exit(2)
if behaviour == "broken":
    sys.exit("the last words")
if behaviour == "silent":
    signal.pause()
if behaviour == "parent":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
server = socket.create_server(("127.0.0.1", int(port)))
def stop(*_):
    if behaviour == "stubborn":
        return
    with open(os.path.join(folder, "stopped"), "a") as order:
        order.write(name + "\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
print("serving")
sys.stdout.flush()
while True:
    connection, _ = server.accept()
    connection.recv(100)
    connection.sendall(b"+PONG\\r\\n")
    connection.close()
"""

SUPERVISOR = """
import asyncio, json, sys
from pathlib import Path
from headrace.errors import StartupError
from headrace.supervisor import StateDir, serve
from headrace.supervisor.plan import MeshConfig, ProcessSpec
state, specs = StateDir(Path(sys.argv[1])), json.loads(sys.argv[2])
state.create()
config = MeshConfig("m=/m", "sim", 1, "127.0.0.1:1", "127.0.0.1:2")
kept = [ProcessSpec(n, r, a, "redis", tuple(argv)) for n, r, a, argv in specs]
try:
    asyncio.run(serve(config, kept, state, lambda text: print(text, flush=True)))
except StartupError as error:
    sys.exit(str(error))
"""


def wait_for(what: str, probe: Callable[[], T | None], timeout_s: float = 20) -> T:
    """What `probe` returns, once that is true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if got := probe():
            return got
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout_s} s for {what}")


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs. Nobody may be there to wait for one: a zombie is gone."""
    return not any(
        p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes if _exists(p)
    )


def _exists(process: psutil.Process) -> bool:
    try:
        process.status()
    except psutil.NoSuchProcess:
        return False
    return True


class Kept:
    """A supervisor of small programs: `behaviours` by name."""

    def __init__(self, folder: Path, ports: list[int], behaviours: dict[str, str]) -> None:
        self.folder = folder
        self.state = StateDir(folder / "state")
        specs: list[tuple[str, Role | str, str, list[str]]] = []
        for (name, behaviour), port in zip(behaviours.items(), ports, strict=True):
            argv = [sys.executable, "-I", "-S", "-c", CHILD, name, str(port), behaviour]
            role = name.partition("-")[0]
            specs.append((name, role, f"127.0.0.1:{port}", [*argv, str(folder)]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(self.state.root), json.dumps(specs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []

    def mesh(self, condition: Callable[[MeshState], Any]) -> MeshState:
        """The mesh once `condition` holds of it."""

        def probe() -> MeshState | None:
            mesh = self.state.read()
            return mesh if mesh is not None and condition(mesh) else None

        return wait_for("the mesh", probe)

    def ready(self) -> MeshState:
        """The mesh once everything is ready."""
        return self.mesh(
            lambda m: m.phase == "ready" and all(p.phase == "ready" for p in m.processes)
        )

    def next_line(self) -> str:
        """The next thing it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Signal it and wait: exit status, and what it said on both channels."""
        self.process.send_signal(number)
        return self.finish()

    def finish(self) -> tuple[int, str, str]:
        """Wait until it ends by itself."""
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err

    def tree(self) -> list[psutil.Process]:
        """All processes below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        """Leave nothing behind, whatever the test did."""
        if self.process.poll() is None:
            below = self.tree()
            self.process.kill()
            for process in below:
                if _exists(process):
                    process.kill()
        with self.process:
            pass
