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
    from rich.console import Console

    from headrace.supervisor import StateDir
    from headrace.supervisor.state import ProcessState
    from headrace.v1.router_pb2 import GetFleetResponse

EXIT_UNHEALTHY = 1
EXIT_NOT_RUNNING = 3
_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker as the router sees it."""

    worker_id: str
    model: str
    address: str
    generation: int
    reachable: bool
    draining: bool
    owned_blocks: int
    #: By tier, the device's own memory and slower ones.
    tiers: dict[str, int]
    #: Events that are in Redis and not in the router's index yet.
    event_lag: int
    active_sequences: int
    queued_sequences: int
    reservations: int
    resyncs: int
    last_resync_cause: str


@dataclass(frozen=True, slots=True)
class RouterRow:
    """What the router counted since its start."""

    policy: str
    redis_connected: bool
    #: What is wrong with Redis now; empty while all is well.
    redis_trouble: str
    blocks: int
    index_bytes: int
    decisions: int
    #: Decisions for prompts of which no worker held anything.
    zero_matches: int
    prompt_tokens: int
    matched_tokens: int
    #: Workers read anew, by the kind of cause.
    resyncs: dict[str, int]
    #: Requests that wait now for a worker with room, and that had to since the start.
    waiting: int
    waits: int
    #: Of these, refused: for a full queue, or for their time.
    queue_refusals: int
    queue_deadlines: int


@dataclass(frozen=True, slots=True)
class Report:
    """All that `status` says. `healthy` has an entry for each process."""

    mesh: MeshState
    healthy: dict[str, bool]
    workers: list[WorkerRow]
    #: Workers that the router refuses, and why.
    refused: list[str]
    #: None while it does not answer.
    router: RouterRow | None = None

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
    fleet = await _fleet(mesh.address_of("router"))
    if fleet is None:
        return Report(mesh, healthy, [], [])
    return Report(mesh, healthy, _workers(fleet), _refused(fleet), _router(fleet))


async def _fleet(router: str) -> GetFleetResponse | None:
    """What the router knows; None if it does not answer."""
    import grpc

    from headrace.rpc import options
    from headrace.v1 import router_pb2, router_pb2_grpc

    async with grpc.aio.insecure_channel(router, options=options.CHANNEL) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        try:
            return await stub.GetFleet(router_pb2.GetFleetRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None


def _workers(fleet: GetFleetResponse) -> list[WorkerRow]:
    return [
        WorkerRow(
            worker_id=state.worker.worker_id,
            model=model.card.name,
            address=state.worker.address,
            generation=state.worker.generation,
            reachable=state.reachable,
            draining=state.draining,
            owned_blocks=state.owned_blocks,
            tiers={entry.tier: entry.blocks for entry in state.tiers},
            event_lag=state.event_lag,
            active_sequences=state.active_sequences,
            queued_sequences=state.queued_sequences,
            reservations=state.reservations,
            resyncs=state.resyncs,
            last_resync_cause=state.last_resync_cause,
        )
        for model in fleet.models
        for state in model.workers
    ]


def _refused(fleet: GetFleetResponse) -> list[str]:
    return [
        f"{refusal.worker.worker_id}: {refusal.reason}"
        for model in fleet.models
        for refusal in model.refused
    ]


def _router(fleet: GetFleetResponse) -> RouterRow:
    counters = fleet.counters
    return RouterRow(
        policy=fleet.policy,
        redis_connected=fleet.redis_connected,
        redis_trouble=fleet.redis_trouble,
        blocks=fleet.index.blocks,
        index_bytes=fleet.index.num_bytes,
        decisions=counters.decisions,
        zero_matches=counters.zero_matches,
        prompt_tokens=counters.prompt_tokens,
        matched_tokens=counters.matched_tokens,
        resyncs=dict(sorted(counters.resyncs.items())),
        waiting=sum(queue.waiting for queue in fleet.queues.values()),
        waits=counters.waits,
        queue_refusals=counters.queue_refusals,
        queue_deadlines=counters.queue_deadlines,
    )


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
        "router": asdict(report.router) if report.router else None,
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
    _show_workers(report.workers, console)
    if report.router is not None:
        _show_router(report.router)
    for line in report.refused:
        click.echo(f"refused  {line}")
    if not report.is_healthy:
        for process in mesh.processes:
            if not report.healthy[process.name]:
                click.echo(f"log      {process.log}")


def _show_workers(workers: list[WorkerRow], console: Console) -> None:
    from rich.table import Table

    names = ("worker", "model", "reachable", "blocks", "lag", "active", "queued", "last resync")
    table = Table(*names, box=None, pad_edge=False)
    for row in workers:
        blocks = " + ".join(f"{count} {tier}" for tier, count in row.tiers.items())
        if list(row.tiers) in ([], ["device"]):
            blocks = str(row.owned_blocks)
        reachable = "no" if not row.reachable else "draining" if row.draining else "yes"
        counts = map(str, (row.event_lag, row.active_sequences, row.queued_sequences))
        resync = f"{row.last_resync_cause} ({row.resyncs} in all)"
        table.add_row(row.worker_id, row.model, reachable, blocks, *counts, resync)
    console.print(table)


def _show_router(row: RouterRow) -> None:
    hits = 100 * row.matched_tokens / row.prompt_tokens if row.prompt_tokens else 0.0
    resyncs = ", ".join(f"{count} {cause}" for cause, count in row.resyncs.items()) or "none"
    click.echo(
        f"\nrouter   {row.policy}: {row.decisions} decisions, {row.zero_matches} with no match, "
        f"{hits:.0f} % of prompt tokens found; {row.blocks} blocks known "
        f"in {row.index_bytes / 1e6:.1f} MB; resyncs: {resyncs}"
    )
    if row.waits:
        click.echo(
            f"queue    {row.waiting} wait for a worker with room, {row.waits} did in all; refused: "
            f"{row.queue_refusals} for a full queue, {row.queue_deadlines} for their time"
        )
    if row.redis_trouble:
        click.echo(f"redis    {row.redis_trouble}")
