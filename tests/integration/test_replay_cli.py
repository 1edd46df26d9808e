"""`headrace replay` as a user runs it: a process, files, a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.cli_parts import wait_for

ROOT = Path(__file__).resolve().parents[2]
HEADRACE = str(Path(sys.executable).with_name("headrace"))
SLICE = str(ROOT / "tests" / "data" / "mooncake_500.jsonl")
SESSIONS = str(ROOT / "tests" / "data" / "agent_sessions.jsonl")


def _run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    words = [HEADRACE, "replay", *(str(argument) for argument in arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, timeout=100)


def _refused(*arguments: object, status: int = 1) -> str:
    done = _run(*arguments)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def _figures(*arguments: object) -> dict[str, Any]:
    done = _run(*arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def test_the_slice_whole(tmp_path: Path) -> None:
    done = _run(
        *(SLICE, "--policy", "kv,round_robin", "--speed", 4),
        *("--json", "out.json", "--plot", "out.png"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "kv ×4: 500 requests replayed" in done.stderr
    for word in ("TTFT", "ITL", "end to end", "reuse", "round_robin"):
        assert word in done.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    kv, round_robin = json.loads((tmp_path / "out.json").read_text())["replays"]
    for report in (kv, round_robin):
        assert report["completed"] == report["ttft"]["count"] == report["requests"] == 500
        assert 0 < report["floor_ttft"]["mean"] <= report["ttft"]["mean"]
        assert report["ttft"]["p50"] <= report["ttft"]["p99"] <= report["ttft"]["max"]
        assert len(report["workers"]) == 8
    assert kv["reuse_ratio"] > round_robin["reuse_ratio"] > 0


def test_equal_options_give_equal_figures() -> None:
    options = (SLICE, "--limit", 80, "--policy", "kv,least_loaded", "--speed", 8, "--fail", "1@5")
    one, two = (_figures(*options, "--seed", 3, "--jobs", jobs) for jobs in (1, 2))
    assert one.pop("run")["jobs"] == 1
    assert two.pop("run")["jobs"] == 2
    assert one == two
    assert one["replays"][0]["config"]["seed"] == 3


def test_workers_that_fail_leave_and_join() -> None:
    options = (SLICE, "--limit", 120, "--workers", 3, "--speed", 4)
    (calm,) = _figures(*options)["replays"]
    (report,) = _figures(
        *options, "--fail", "1@3", "--leave", "0@4", "--join", "2@5", "--restart", "1@6"
    )["replays"]
    assert calm["migrated"] == 0 < report["migrated"]
    assert report["completed"] == 120
    assert len(report["workers"]) == 5
    assert all(worker["requests"] > 0 for worker in report["workers"])


def test_the_only_worker_dies_and_comes_back() -> None:
    options = (SLICE, "--limit", 40, "--workers", 1)
    (report,) = _figures(*options, "--fail", "0@5", "--restart", "0@7")["replays"]
    assert report["completed"] == 40
    assert report["migrated"] > 0
    (lost,) = _figures(*options, "--fail", "0@5")["replays"]
    assert lost["completed"] + lost["failed"] == 40
    assert sum(lost["errors"].values()) == lost["failed"] > 0


def test_conversations_and_several_routers() -> None:
    (report,) = _figures(SESSIONS, "--workers", 2, "--block-size", 16, "--routers", 3)["replays"]
    assert report["completed"] == report["requests"]
    assert report["reuse_ratio"] > 0.7


def test_traffic_that_shares_nothing() -> None:
    done = _run(
        "synthetic:requests=60,rate=10,prompt=400,output=20", "--workers", 2,
        "--timing", "linear:step_ms=5,prefill_ms_per_token=0.05", "--policy", "least_loaded",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " 0.0%" in done.stdout


def test_help_teaches() -> None:
    text = _run("--help").stdout
    assert text.startswith("Usage: headrace replay [OPTIONS] TRACE")
    for word in ("mooncake", "azure", "sessions", "synthetic:", "--fail 3@300", "roofline:gpu="):
        assert word in text
    overview = subprocess.run([HEADRACE, "--help"], capture_output=True, text=True, check=True)
    assert "replay" in overview.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--workers", "0"], "'--workers'"),
        (["--workers", "1000000000"], "'--workers'"),
        (["--blocks", "-1"], "'--blocks'"),
        (["--blocks", "many"], "'many' is not a valid integer"),
        (["--block-size", "0"], "'--block-size'"),
        (["--host-blocks", "-1"], "'--host-blocks'"),
        (["--host-gbps", "0"], "a bandwidth must be above 0"),
        (["--routers", "0"], "'--routers'"),
        (["--limit", "0"], "'--limit'"),
        (["--speed", "0"], "a speed must be above 0"),
        (["--speed", "1,x"], "not 'x'"),
        (["--policy", "fastest"], "'fastest' is none of kv"),
        (["--fail", "9@1"], "there is no worker 9 then"),
        (["--fail", "1"], "'1' must be WORKER@SECONDS"),
        (["--join", "0@1"], "N must be from 1"),
        (["--format", "xml"], "'xml' is not one of"),
        (["--frobnicate"], "--frobnicate"),
        (["--speed", ",".join(str(speed) for speed in range(1, 250))], "249 runs"),
    ],
)
def test_options_that_cannot_be(options: list[str], named: str) -> None:
    assert named in _refused(SLICE, *options, status=2)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5}\n{"timestamp": "x"}\n')
    for arguments, named in (
        ((bad,), f"{bad}:2: input_length is missing"),
        ((tmp_path / "absent",), "absent can't be read: No such file or directory"),
        ((SLICE, "--policy", "session"), "policy session needs session ids"),
        ((SLICE, "--blocks", 5, "--block-size", 16), "no request fits a worker of 5 blocks"),
        ((SLICE, "--max-step-tokens", 8), "max_step_tokens must be 256 or more, not 8"),
        ((SLICE, "--timing", "abacus"), "sim timing 'abacus' is unknown"),
        ((SLICE, "--json", "/absent/out.json"), "/absent/out.json can't be written"),
        ((SLICE, "--plot", tmp_path / "out.gif"), "--plot writes .png, .svg, .pdf"),
        (("synthetic:request=5",), "no such key: 'request'"),
    ):
        lines = _refused(*arguments).splitlines()
        assert lines[-1].startswith("Error: ")
        assert named in lines[-1]


def test_a_terminal_gets_bars_and_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    with _on_a_terminal(tmp_path) as (replay, terminal):
        os.killpg(replay.pid, signal.SIGINT)
        _read_to_the_end(terminal)
        assert replay.wait(30) == 1
        wait_for("the processes' end", lambda: not _group(replay.pid))


def test_a_process_that_is_killed_is_an_error(tmp_path: Path) -> None:
    with _on_a_terminal(tmp_path) as (replay, terminal):
        runs = [
            child
            for child in psutil.Process(replay.pid).children()
            if "resource_tracker" not in " ".join(child.cmdline())
        ]
        runs[0].kill()
        assert b"a process of the replay was killed" in _read_to_the_end(terminal)
        assert replay.wait(30) == 1
        wait_for("the processes' end", lambda: not _group(replay.pid))


@contextmanager
def _on_a_terminal(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A long replay in two processes, whose bars count requests by now."""
    ours, theirs = pty.openpty()
    replay = subprocess.Popen(
        [HEADRACE, "replay", "synthetic:requests=20000,rate=50", "-p", "kv,round_robin", "-j2"],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        cwd=folder,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 60
    try:
        while not re.search(rb"[1-9]\d*/20000", shown):
            assert time.monotonic() < deadline, shown
            shown += os.read(ours, 4096)
        yield replay, ours
    finally:
        for process in _group(replay.pid):
            process.kill()
        replay.wait()
        os.close(ours)


def _group(pid: int) -> list[psutil.Process]:
    """The living processes of the group."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _read_to_the_end(terminal: int) -> bytes:
    """What is written until nobody holds the other end."""
    shown = b""
    # EIO: the last of them is gone.
    with suppress(OSError):
        while more := os.read(terminal, 4096):
            shown += more
    return shown
