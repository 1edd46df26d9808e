"""`headrace up`: a mesh on this machine, in the foreground or detached."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from headrace.cli.display import open_display
from headrace.cli.state import DEFAULT_GRPC, DEFAULT_HTTP, state_dir_option
from headrace.errors import StartupError

if TYPE_CHECKING:
    from typing import IO

    from headrace.cli.display import Display
    from headrace.supervisor import MeshState, StateDir
    from headrace.supervisor.plan import MeshConfig
    from headrace.supervisor.supervisor import Supervisor

DEFAULT_MODEL = "smollm2-135m"
_REFRESH_S = 0.1


@click.command()
@click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    metavar="SPEC",
    help="A pulled model's name, a path, or NAME=PATH.",
)
@click.option(
    "--engine",
    type=click.Choice(["torch", "sim"]),
    default="torch",
    show_default=True,
    help="torch computes; sim only keeps time, for trying the mesh itself.",
)
@click.option("--workers", default=1, show_default=True, metavar="N", help="Worker processes.")
@click.option(
    "--gateway-processes",
    default=1,
    show_default=True,
    metavar="N",
    help="Gateway processes, all on the same two ports.",
)
@click.option(
    "--http",
    default=DEFAULT_HTTP,
    show_default=True,
    metavar="HOST:PORT",
    help="Where OpenAI clients connect. Port 0: a free one.",
)
@click.option(
    "--grpc",
    default=DEFAULT_GRPC,
    show_default=True,
    metavar="HOST:PORT",
    help="Where gRPC clients connect. Port 0: a free one.",
)
@click.option(
    "--redis",
    default="",
    metavar="URL",
    help="Your Redis or Valkey, for example redis://127.0.0.1:6379/0. [an embedded Valkey]",
)
@click.option("--detach", "-d", is_flag=True, help="Return once it is ready; it goes on running.")
@state_dir_option
def up(
    model: str,
    engine: str,
    workers: int,
    gateway_processes: int,
    http: str,
    grpc: str,
    redis: str,
    detach: bool,
    state: StateDir,
) -> None:
    """Start a mesh on this machine and print how to talk to it.

    Starts an embedded Valkey, a tokenizer pool, a router, workers and a gateway,
    restarts what dies, and on Ctrl-C finishes what runs and stops them all.
    Services read more options from the environment, for example
    HEADRACE_WORKER_KV_CACHE_MIB=4096.

    \b
    headrace up                               the default model, on this terminal
    headrace up --detach                      in the background; stop: headrace down
    headrace up --model hf:OWNER/NAME         a model that was pulled from a hub
    headrace up --model mine=~/models/a.gguf  a file of yours, served as "mine"
    headrace up --engine sim --workers 4      no arithmetic: try routing and load
    """
    from headrace.supervisor import prepare
    from headrace.supervisor.plan import MeshConfig

    state.create()
    with state.lock() as lock:
        config = prepare(MeshConfig(model, engine, workers, http, grpc, redis, gateway_processes))
        state.clear()
        if detach:
            _detached(config, state, lock)
        else:
            asyncio.run(_foreground(config, state))
            click.echo("Stopped.", err=True)


async def _foreground(config: MeshConfig, state: StateDir) -> None:
    from headrace.supervisor import processes, serve

    display = open_display(state)

    async def watch(supervisor: Supervisor) -> None:
        while supervisor.mesh.phase == "starting":
            display.update(supervisor.mesh)
            await asyncio.sleep(_REFRESH_S)
        if supervisor.mesh.phase == "ready":
            display.close()
            click.echo(greeting(supervisor.mesh, state, "Ctrl-C"))

    try:
        await serve(config, processes(config, state), state, display.say, watch)
    finally:
        display.close()


def _detached(config: MeshConfig, state: StateDir, lock: IO[bytes]) -> None:
    import msgspec

    state.put_log_aside("supervisor")
    command = [sys.executable, "-P", "-m", "headrace.supervisor"]
    with state.log("supervisor").open("ab") as log:
        supervisor = subprocess.Popen(
            [*command, str(state.root), str(lock.fileno())],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
    assert supervisor.stdin is not None
    with supervisor.stdin as pipe:
        pipe.write(msgspec.json.encode(config))
    display = open_display(state)
    try:
        mesh = _until_ready(supervisor, state, display)
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait()
        raise
    finally:
        display.close()
    click.echo(greeting(mesh, state, "headrace down{option}"))
    # It is meant to outlive us: not a child that somebody forgot to wait for.
    supervisor.returncode = 0


def _until_ready(
    supervisor: subprocess.Popen[bytes], state: StateDir, display: Display
) -> MeshState:
    while True:
        ended = supervisor.poll() is not None
        mesh = state.read()
        if mesh is not None and not ended:
            if mesh.phase == "ready":
                return mesh
            if mesh.phase == "starting":
                display.update(mesh)
        if ended:
            error = mesh.error if mesh and mesh.error else state.last_line("supervisor")
            raise StartupError(error or "the supervisor was stopped")
        time.sleep(_REFRESH_S)


def greeting(mesh: MeshState, state: StateDir, stop: str) -> str:
    """Addresses, first requests that work as printed, and how to stop it: `stop`, where
    `{option}` is what names a state directory that is not the usual one."""
    from headrace.supervisor import default_state_dir
    from headrace.supervisor.plan import local_address

    http, grpc = local_address(mesh.http), local_address(mesh.grpc)
    message = {"role": "user", "content": "Why is the sky blue?"}
    over_http = {
        "model": mesh.model,
        "messages": [message],
        "max_tokens": 64,
        "temperature": 0.2,
        "stream": True,
    }
    over_grpc = {
        "model": mesh.model,
        "chat": {"messages": [message]},
        "sampling": {"maxTokens": 64, "temperature": 0.2},
    }
    curl = ["curl", "-sN", f"http://{http}/v1/chat/completions"]
    curl += ["-H", "content-type: application/json", "-d", json.dumps(over_http)]
    buf = [_buf(), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    buf += ["-d", json.dumps(over_grpc)]
    buf += [f"http://{grpc}/headrace.v1.InferenceService/Generate"]
    option = ""
    if state.root != default_state_dir().absolute():
        option = f" --state-dir {shlex.quote(str(state.root))}"
    workers = sum(process.role == "worker" for process in mesh.processes)
    return f"""
{mesh.model} is ready after {mesh.ready_after_s:.1f} s \
({mesh.engine} engine, {workers} worker{"s" * (workers != 1)})

  HTTP   http://{http}/v1    for OpenAI clients
  gRPC   {grpc}    headrace.v1.InferenceService, with reflection
  logs   {state.root / "logs"}

{shlex.join(curl)}

{shlex.join(buf)}

Talk to it:  headrace chat{option} "Why is the sky blue?"
Stop it:     {stop.format(option=option)}"""


def _buf() -> str:
    beside = Path(sys.executable).with_name("buf")
    return str(beside) if beside.exists() else shutil.which("buf") or "buf"
