"""`python -m services.gateway --processes`: the parent alone, with no mesh behind it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from headrace.supervisor.ports import free_addresses
from tests.integration.cli_parts import gone, wait_for

NOWHERE = ("--tokenizer", "127.0.0.1:1", "--router", "127.0.0.1:1", "--drain-timeout-s", "1")


class Parent:
    """A parent of two gateways."""

    def __init__(self, folder: Path) -> None:
        self.http, self.grpc = free_addresses(2)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                gateway("--http", self.http, "--grpc", self.grpc, "--processes", "2"),
                stdout=log,
                stderr=log,
            )

    def gateways(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def two(self, without: int = 0) -> list[psutil.Process]:
        """Both, once they are gateways and none is `without`."""

        def probe() -> list[psutil.Process] | None:
            found = [p for p in self.gateways() if _is_gateway(p)]
            return found if len(found) == 2 and without not in [p.pid for p in found] else None

        return wait_for("two gateways", probe)

    def close(self) -> None:
        below = self.gateways() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for process in below:
            if process.is_running():
                process.kill()


def _is_gateway(process: psutil.Process) -> bool:
    """Not the launcher that becomes one, and not one that has just died."""
    try:
        return "services.gateway" in process.cmdline() and "-I" not in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def gateway(*flags: str) -> list[str]:
    return [sys.executable, "-P", "-m", "services.gateway", *NOWHERE, *flags]


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Parent]:
    parent = Parent(tmp_path)
    yield parent
    parent.close()


def test_one_that_dies_is_started_again_and_all_stop_together(parent: Parent) -> None:
    first, second = parent.two()
    os.kill(first.pid, signal.SIGKILL)
    again = parent.two(without=first.pid)
    assert second.pid in [process.pid for process in again]
    assert "died (SIGKILL); restarting" in parent.log.read_text()
    taken = subprocess.run(
        gateway("--http", parent.http, "--grpc", "127.0.0.1:0"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert taken.returncode == 2, "the port is held, although nobody may listen yet"
    assert "in use" in taken.stderr
    parent.process.send_signal(signal.SIGTERM)
    assert parent.process.wait(20) == 0
    wait_for("their end", lambda: gone(again))


def test_a_killed_parent_takes_them_with_it(parent: Parent) -> None:
    both = parent.two()
    parent.process.kill()
    parent.process.wait()
    wait_for("their end", lambda: gone(both))


@pytest.mark.parametrize(
    "flags", [("--processes", "0"), ("--processes", "2", "--max-body-len", "x")]
)
def test_what_is_wrong_ends_it(flags: tuple[str, ...]) -> None:
    done = subprocess.run(gateway(*flags), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert flags[-2] in done.stderr


def test_a_taken_port_ends_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        flags = ("--processes", "2", "--http", address, "--grpc", "127.0.0.1:0")
        done = subprocess.run(gateway(*flags), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--http" in done.stderr
