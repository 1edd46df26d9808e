"""`headrace status`: is the mesh of this machine well?"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from headrace.cli.state import state_dir_option
from headrace.supervisor.state import MeshState

if TYPE_CHECKING:
    from headrace.supervisor import StateDir
    from headrace.supervisor.state import ProcessState

EXIT_UNHEALTHY = 1
EXIT_NOT_RUNNING = 3
_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker as the router sees it."""

    worker_id: str
    model: str
    address: str
    reachable: bool
    owned_blocks: int
    active_sequences: int
    queued_sequences: int


@dataclass(frozen=True, slots=True)
class Report:
    """All that `status` says. `healthy` has an entry for each process."""

    mesh: MeshState
    healthy: dict[str, bool]
    workers: list[WorkerRow]
    #: Workers that the router refuses, and why.
    refused: list[str]

    @property
    def is_healthy(self) -> bool:
        """Every process serves, and the router reaches every worker that was started."""
        wanted = sum(process.role == "worker" for process in self.mesh.processes)
        return (
            self.mesh.phase == "ready"
            and all(self.healthy.values())
            and sum(row.reachable for row in self.workers) >= wanted
            and not self.refused
        )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@state_dir_option
@click.pass_context
def status(ctx: click.Context, as_json: bool, state: StateDir) -> None:
    """Show processes, workers and health.

    Exit status: 0 all is well, 1 something is not, 3 no mesh runs.

    \b
    headrace status
    headrace status --json | python -m json.tool
    headrace status >/dev/null && echo well
    """
    from headrace.supervisor import is_running

    mesh = state.read()
    if mesh is None or not is_running(mesh):
        error = mesh.error if mesh is not None else ""
        if as_json:
            click.echo(json.dumps({"running": False, "healthy": False, "error": error}))
        else:
            click.echo(f"No mesh runs with the state directory {state.root}.")
            if error:
                click.echo(f"The last one failed: {error}")
        ctx.exit(EXIT_NOT_RUNNING)
    report = asyncio.run(examine(mesh))
    if as_json:
        click.echo(json.dumps(_as_json(report), indent=2))
    else:
        _show(report)
    ctx.exit(0 if report.is_healthy else EXIT_UNHEALTHY)


async def examine(mesh: MeshState) -> Report:
    """Ask every process, and the router for its workers."""
    from headrace.supervisor import probe

    async def ask(process: ProcessState) -> bool:
        if process.phase != "ready":
            return False
        if process.role == "valkey":
            return await probe.answers_redis(process.address)
        return await probe.serves_grpc(process.address)

    answers = await asyncio.gather(*(ask(process) for process in mesh.processes))
    healthy = {p.name: answer for p, answer in zip(mesh.processes, answers, strict=True)}
    workers, refused = await _fleet(mesh.address_of("router"))
    return Report(mesh, healthy, workers, refused)


async def _fleet(router: str) -> tuple[list[WorkerRow], list[str]]:
    """What the router knows; nothing if it does not answer."""
    import grpc

    from headrace.rpc import options
    from headrace.v1 import router_pb2, router_pb2_grpc

    async with grpc.aio.insecure_channel(router, options=options.CHANNEL) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        try:
            fleet = await stub.GetFleet(router_pb2.GetFleetRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return [], []
    workers = [
        WorkerRow(
            worker_id=state.worker.worker_id,
            model=model.card.name,
            address=state.worker.address,
            reachable=state.reachable,
            owned_blocks=state.owned_blocks,
            active_sequences=state.active_sequences,
            queued_sequences=state.queued_sequences,
        )
        for model in fleet.models
        for state in model.workers
    ]
    refused = [
        f"{refusal.worker.worker_id}: {refusal.reason}"
        for model in fleet.models
        for refusal in model.refused
    ]
    return workers, refused


def _as_json(report: Report) -> dict[str, object]:
    mesh = report.mesh
    return {
        "running": True,
        "healthy": report.is_healthy,
        "phase": mesh.phase,
        "pid": mesh.pid,
        "model": mesh.model,
        "engine": mesh.engine,
        "http": mesh.http,
        "grpc": mesh.grpc,
        "redis": mesh.redis,
        "processes": [
            {
                "name": process.name,
                "role": process.role,
                "phase": process.phase,
                "healthy": report.healthy[process.name],
                "pid": process.pid,
                "address": process.address,
                "restarts": process.restarts,
                "log": process.log,
            }
            for process in mesh.processes
        ],
        "workers": [asdict(row) for row in report.workers],
        "refused": report.refused,
    }


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    mesh = report.mesh
    word = "well" if report.is_healthy else "not well"
    click.echo(f"{mesh.model} ({mesh.engine} engine), {mesh.phase}, {word}; supervisor {mesh.pid}")
    click.echo(f"HTTP http://{mesh.http}/v1   gRPC {mesh.grpc}   Redis {mesh.redis}\n")
    console = Console(highlight=False, markup=False)
    table = Table("process", "pid", "health", "address", "restarts", box=None, pad_edge=False)
    for process in mesh.processes:
        health = "ok" if report.healthy[process.name] else "does not serve"
        phase = health if process.phase == "ready" else process.phase
        pid, restarts = str(process.pid or "-"), str(process.restarts)
        table.add_row(process.name, pid, phase, process.address, restarts)
    console.print(table)
    click.echo()
    table = Table(
        *("worker", "model", "reachable", "blocks", "active", "queued"), box=None, pad_edge=False
    )
    for row in report.workers:
        counts = (row.owned_blocks, row.active_sequences, row.queued_sequences)
        reachable = "yes" if row.reachable else "no"
        table.add_row(row.worker_id, row.model, reachable, *map(str, counts))
    console.print(table)
    for line in report.refused:
        click.echo(f"refused  {line}")
    if not report.is_healthy:
        for process in mesh.processes:
            if not report.healthy[process.name]:
                click.echo(f"log      {process.log}")
