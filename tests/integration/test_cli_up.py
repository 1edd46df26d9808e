"""`headrace up` with the real services over the sim engine, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from headrace.models.store import resolve
from tests.integration.cli_parts import HEADRACE, gone, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FREE = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
SIM = ("--engine", "sim", *FREE)


class Cli:
    """The command line, on one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        #: What `up` printed.
        self.greeting = ""
        self.environment = {**os.environ, "HEADRACE_STATE": str(state)}

    def __call__(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [HEADRACE, *arguments],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A command that goes on."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [HEADRACE, *arguments], env=self.environment, stdout=pipe, stderr=pipe, text=True
        )

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self("status", "--json").stdout))

    def is_well(self) -> bool:
        return self("status").returncode == 0

    def tree(self) -> list[psutil.Process]:
        """The supervisor and everything below it."""
        supervisor = psutil.Process(self.status()["pid"])
        return [supervisor, *supervisor.children(recursive=True)]


@pytest.fixture(scope="module")
def detached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """A mesh of two sim workers in the background, which ends without a trace."""
    cli = Cli(tmp_path_factory.mktemp("mesh") / "state")
    up = cli("up", "--detach", "--workers", "2", *SIM)
    assert up.returncode == 0, up.stderr
    below = cli.tree()
    cli.greeting = up.stdout
    yield cli
    down = cli("down")
    assert (down.returncode, down.stdout) == (0, "Stopped.\n")
    assert gone(below)
    assert not (cli.state / "mesh.json").exists()


@pytest.fixture
def make_cli(tmp_path: Path) -> Iterator[Callable[[], Cli]]:
    made: list[Cli] = []

    def make() -> Cli:
        made.append(Cli(tmp_path / f"state{len(made)}"))
        return made[-1]

    yield make
    for cli in made:
        cli("down", "--timeout", "0")


def test_a_detached_mesh_is_well(detached: Cli) -> None:
    done = detached("status")
    assert done.returncode == 0
    assert "sim engine), ready, well" in done.stdout
    report = detached.status()
    names = [process["name"] for process in report["processes"]]
    assert names == ["valkey", "tokenizer", "router", "worker-0", "worker-1", "gateway"]
    assert report["healthy"]
    assert [worker["reachable"] for worker in report["workers"]] == [True, True]


def test_the_printed_lines_work_as_printed(detached: Cli) -> None:
    lines = detached.greeting.splitlines()
    curl = next(line for line in lines if line.startswith("curl "))
    buf = next(line for line in lines if "buf curl " in line)
    streamed = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True)
    assert streamed.stdout.rstrip().endswith("data: [DONE]")
    called = subprocess.run(buf, shell=True, capture_output=True, text=True, check=True)
    assert "FINISH_REASON_" in called.stdout


def test_chat_streams_an_answer(detached: Cli) -> None:
    said = detached("chat", "--max-tokens", "5", "--temperature", "0", "Hello")
    assert (said.returncode, said.stdout.strip() != "") == (0, True)
    # The same prompt from standard input.
    again = detached("chat", "--max-tokens", "5", "--temperature", "0", stdin="Hello")
    assert again.stdout == said.stdout


def test_chat_names_what_is_wrong(detached: Cli) -> None:
    wrong = detached("chat", "--model", "nobody", "Hello")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("Error: ")
    assert "nobody" in wrong.stderr
    nobody = detached("chat", "--address", "127.0.0.1:1", "Hello")
    assert "no gateway answers at 127.0.0.1:1" in nobody.stderr


def test_control_c_ends_an_answer(detached: Cli) -> None:
    with detached.start("chat", "--max-tokens", "5000", "Hello") as chat:
        assert chat.stdout is not None
        chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        assert chat.wait(10) == 130
        assert chat.stderr is not None
        assert "Traceback" not in chat.stderr.read()
    wait_for(
        "idle workers",
        lambda: all(w["active_sequences"] == 0 for w in detached.status()["workers"]),
    )


def test_a_second_up_is_refused(detached: Cli) -> None:
    second = detached("up", *SIM)
    assert second.returncode == 1
    assert second.stderr.startswith("Error: a mesh runs already with the state directory")
    assert detached.is_well()


def test_a_killed_worker_comes_back_on_its_port(detached: Cli) -> None:
    before = detached.status()["processes"][3]
    os.kill(before["pid"], signal.SIGKILL)
    assert detached("status").returncode == 1
    wait_for("health", detached.is_well)
    after = detached.status()["processes"][3]
    assert after["address"] == before["address"]
    assert (after["restarts"], after["pid"] != before["pid"]) == (1, True)
    log = (detached.state / "logs" / "supervisor.log").read_text()
    assert "worker-0 died (SIGKILL); restarting in 0.1 s; log: " in log


def test_a_stopped_process_is_not_well(detached: Cli) -> None:
    tokenizer = detached.status()["processes"][1]["pid"]
    os.kill(tokenizer, signal.SIGSTOP)
    try:
        done = detached("status")
        assert done.returncode == 1
        assert "does not serve" in done.stdout
    finally:
        os.kill(tokenizer, signal.SIGCONT)
    wait_for("health", detached.is_well)


def test_in_the_foreground_it_drains_on_a_signal(make_cli: Callable[[], Cli]) -> None:
    cli = make_cli()
    with cli.start("up", *SIM) as up:
        assert up.stdout is not None
        while "is ready after" not in up.stdout.readline():
            assert up.poll() is None
        below = cli.tree()
        up.send_signal(signal.SIGTERM)
        assert up.wait(30) == 0
    assert gone(below)
    assert cli("status").returncode == 3


def test_a_killed_supervisor_leaves_nothing(make_cli: Callable[[], Cli]) -> None:
    cli = make_cli()
    assert cli("up", "--detach", *SIM).returncode == 0
    supervisor, *below = cli.tree()
    assert len(below) >= 5
    supervisor.kill()
    wait_for("everything's end", lambda: gone(below))
    done = cli("status")
    assert (done.returncode, done.stdout.startswith("No mesh runs")) == (3, True)
    assert cli("down").returncode == 0


def test_a_port_in_use_is_named_before_anything_starts(make_cli: Callable[[], Cli]) -> None:
    cli = make_cli()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = cli("up", "--engine", "sim", "--http", address, "--grpc", "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"Error: --http {address}: the port is in use; stop what listens there; "
        "choose another with --http HOST:PORT\n"
    )
    assert not list((cli.state / "logs").iterdir())


def test_a_missing_model_says_how_to_pull_it(make_cli: Callable[[], Cli], tmp_path: Path) -> None:
    cli = make_cli()
    cli.environment["HEADRACE_MODELS"] = str(tmp_path / "empty")
    done = cli("up", *SIM)
    assert done.returncode == 1
    assert "headrace models pull smollm2-135m" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_service_that_cannot_start_ends_all(make_cli: Callable[[], Cli], tmp_path: Path) -> None:
    cli = make_cli()
    broken = tmp_path / "broken.gguf"
    with resolve("smollm2-135m").path.open("rb") as file:
        broken.write_bytes(file.read(100_000))
    done = cli("up", "--detach", "--model", f"broken={broken}", *SIM)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert "can't start: model file" in last
    assert f"log: {cli.state}/logs/" in last
    status = cli("status")
    assert status.returncode == 3
    assert "can't start: model file" in status.stdout


def test_models_are_listed_and_shown(make_cli: Callable[[], Cli]) -> None:
    cli = make_cli()
    listed = cli("models", "list")
    assert (listed.returncode, "smollm2-135m" in listed.stdout) == (0, True)
    shown = cli("models", "show", "smollm2-135m")
    assert shown.returncode == 0
    for line in ("architecture  llama", "context       8,192 tokens", "licence       Apache-2.0"):
        assert line in shown.stdout
    quiet = cli("models", "pull", "smollm2-135m", "--quiet-if-present")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    unsaid = cli("models", "pull", "hf:owner/name")
    assert unsaid.returncode == 1


@pytest.mark.parametrize("command", ["up", "down", "status", "chat", "models list", "models pull"])
def test_help_teaches_by_example(make_cli: Callable[[], Cli], command: str) -> None:
    done = make_cli()(*command.split(), "--help")
    assert done.returncode == 0
    assert f"  headrace {command}" in done.stdout
