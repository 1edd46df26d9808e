"""The supervisor over small real programs: start, restart, stop, and dying itself."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

from headrace.supervisor.ports import free_addresses
from tests.integration.cli_parts import Kept, gone, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MESH = {"valkey": "", "worker-0": "", "tokenizer": "", "worker-1": "", "router": "", "gateway": ""}


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Callable[[dict[str, str]], Kept]]:
    started: list[Kept] = []

    def start(behaviours: dict[str, str]) -> Kept:
        ports = [int(a.rpartition(":")[2]) for a in free_addresses(len(behaviours))]
        started.append(Kept(tmp_path, ports, behaviours))
        return started[-1]

    yield start
    for kept in started:
        kept.close()


def test_everything_starts_and_stops_in_order(keep: Callable[[dict[str, str]], Kept]) -> None:
    kept = keep(MESH)
    mesh = kept.ready()
    below = kept.tree()
    assert {p.pid for p in below} == {p.pid for p in mesh.processes}
    status, out, err = kept.end()
    assert (status, err) == (0, "")
    assert out.startswith("stopping")
    order = (kept.folder / "stopped").read_text().split()
    assert [name.partition("-")[0] for name in order] == [
        *("gateway", "worker", "worker", "router", "tokenizer", "valkey")
    ]
    assert gone(below)
    assert kept.state.read() is None


def test_what_dies_is_restarted_on_its_port(keep: Callable[[dict[str, str]], Kept]) -> None:
    kept = keep({"router": "", "worker-0": ""})
    before = {p.name: p for p in kept.ready().processes}
    os.kill(before["worker-0"].pid, signal.SIGKILL)
    log = kept.state.log("worker-0")
    assert kept.next_line() == f"worker-0 died (SIGKILL); restarting in 0.1 s; log: {log}"
    assert kept.next_line().startswith("worker-0 is back")
    after = {p.name: p for p in kept.ready().processes}
    assert after["router"] == before["router"]
    assert after["worker-0"].restarts == 1
    assert after["worker-0"].pid != before["worker-0"].pid
    assert after["worker-0"].address == before["worker-0"].address


def test_what_a_dead_process_had_started_dies_too(keep: Callable[[dict[str, str]], Kept]) -> None:
    kept = keep({"worker-0": "parent"})
    worker = psutil.Process(kept.ready().processes[0].pid)
    engines = worker.children()
    assert len(engines) == 1
    worker.kill()
    wait_for("the engine's end", lambda: gone(engines))


def test_a_killed_supervisor_takes_all_with_it(keep: Callable[[dict[str, str]], Kept]) -> None:
    kept = keep(MESH)
    kept.ready()
    below = kept.tree()
    kept.process.kill()
    wait_for("everything's end", lambda: gone(below))


def test_a_misconfigured_process_ends_the_start(keep: Callable[[dict[str, str]], Kept]) -> None:
    kept = keep({"router": "", "worker-0": "misconfigured"})
    status, _, err = kept.finish()
    log = kept.state.log("worker-0")
    assert status == 1
    assert err == (f"worker-0 can't start: no such model: x (exit status 2; log: {log})\n")
    mesh = kept.state.read()
    assert mesh is not None
    assert mesh.phase == "failed"
    assert mesh.error == err.strip()
    assert [p.pid for p in mesh.processes] == [0, 0]


def test_a_process_that_keeps_dying_ends_the_start(keep: Callable[[dict[str, str]], Kept]) -> None:
    kept = keep({"worker-0": "broken"})
    status, out, err = kept.finish()
    assert status == 1
    assert err.startswith("worker-0 can't start: the last words (exit status 1; log: ")
    assert [line.partition(";")[0] for line in out.splitlines()] == [
        "worker-0 died (exit status 1)"
    ] * 2


def test_it_goes_on_when_nobody_hears_it(keep: Callable[[dict[str, str]], Kept]) -> None:
    kept = keep({"router": "", "worker-0": ""})
    before = kept.ready()
    assert kept.process.stdout is not None
    kept.process.stdout.close()
    os.kill(before.processes[1].pid, signal.SIGKILL)
    kept.mesh(lambda m: m.processes[1].restarts == 1 and m.processes[1].phase == "ready")
    below = kept.tree()
    kept.process.send_signal(signal.SIGHUP)
    kept.process.wait(20)
    assert gone(below)
    assert kept.state.read() is None


def test_a_second_signal_does_not_wait(keep: Callable[[dict[str, str]], Kept]) -> None:
    kept = keep({"gateway": "stubborn"})
    kept.ready()
    below = kept.tree()
    kept.process.send_signal(signal.SIGINT)
    assert kept.next_line().startswith("stopping")

    def killed() -> bool:
        if gone(below):
            return True
        # One that comes at once is the same signal, passed on twice.
        kept.process.send_signal(signal.SIGINT)
        return False

    wait_for("the gateway's end", killed)
    status, _, err = kept.finish()
    assert (status, err) == (0, "")


def test_a_stop_during_the_start_leaves_nothing(keep: Callable[[dict[str, str]], Kept]) -> None:
    kept = keep({"valkey": "", "router": "silent", "gateway": ""})
    kept.mesh(lambda m: [p.phase for p in m.processes] == ["ready", "starting", "ready"])
    below = kept.tree()
    status, _, err = kept.end()
    assert (status, err) == (0, "")
    assert gone(below)
    assert kept.state.read() is None
