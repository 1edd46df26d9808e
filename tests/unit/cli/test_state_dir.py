"""mesh.json, locks and logs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from headrace.errors import StartupError
from headrace.supervisor.state import MeshState, ProcessState, StateDir, is_running, start_time

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    state = StateDir(tmp_path / "state")
    state.create()
    return state


def mesh(pid: int, started: int) -> MeshState:
    process = ProcessState("router", "router", "127.0.0.1:5", "ready", "/log", 7, 1)
    return MeshState(pid, started, "ready", "m", "sim", "h:1", "h:2", "embedded", (process,))


def test_a_written_mesh_is_read_again(state: StateDir) -> None:
    written = mesh(1, 2)
    state.write(written)
    assert state.read() == written
    assert written.address_of("router") == "127.0.0.1:5"
    assert written.address_of("gateway") == ""
    assert oct(state.mesh_file.stat().st_mode)[-3:] == "600"


def test_a_broken_mesh_file_is_none(state: StateDir) -> None:
    state.mesh_file.write_text('{"pid": ')
    assert state.read() is None


def test_a_mesh_runs_only_if_the_pid_is_still_the_same_process() -> None:
    started = start_time(os.getpid())
    assert started is not None
    assert is_running(mesh(os.getpid(), started))
    assert not is_running(mesh(os.getpid(), started + 1))
    assert not is_running(None)


def test_a_zombie_does_not_run() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) is None
    child.stdout.close()
    child.wait()


def test_the_lock_is_held_until_it_is_closed(state: StateDir) -> None:
    with state.lock(), pytest.raises(StartupError, match="a mesh runs already"):
        state.lock()
    state.lock().close()


def test_a_child_that_inherits_the_lock_holds_it(state: StateDir) -> None:
    with state.lock() as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()]
        )
    try:
        with pytest.raises(StartupError, match="a mesh runs already"):
            state.lock()
    finally:
        child.communicate(b"\n")
    state.lock().close()


def test_a_long_log_is_put_aside_under_its_writer(state: StateDir) -> None:
    with state.log("x").open("ab", buffering=0) as log:
        log.write(b"a" * 100)
        state.put_log_aside("x", longer_than=100)
        assert state.log("x").stat().st_size == 100
        log.write(b"b")
        state.put_log_aside("x", longer_than=100)
        log.write(b"new\n")
    assert state.log("x").read_bytes() == b"new\n"
    assert state.log("x").with_suffix(".log.1").read_bytes() == b"a" * 100 + b"b"
    assert state.last_line("x") == "new"
    assert state.last_line("never-written") == ""


def test_a_state_directory_that_cannot_be_made_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="--state-dir"):
        StateDir(tmp_path / "file" / "state").create()
