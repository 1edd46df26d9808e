"""The command `headrace replay`: options in; tables, JSON and a picture out.

It composes: traces are read by `traces`, replayed by `runs`, summed up by `report`,
shown by `tables` and `plot`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from headrace.errors import HeadraceError, StartupError
from services.replay import options
from services.replay.checks import check
from services.replay.document import check_writable, document, write
from services.replay.progress import open_progress
from services.replay.report import summarize
from services.replay.runs import run_all
from services.replay.simulation import SimulationConfig
from services.replay.tables import tables
from services.replay.traces import FORMATS, TraceOptions, load
from services.router.policies import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.replay.workload import Trace

_DEFAULT = SimulationConfig()
#: Runs of one command, and requests of a trace that is replayed whole without a word.
MAX_RUNS = 200
_WIDTH = 120


def _count(most: int) -> click.IntRange:
    return click.IntRange(1, most)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("trace")
@click.option(
    "--workers",
    "-w",
    "num_workers",
    type=_count(options.MAX_WORKERS),
    default=_DEFAULT.num_workers,
    show_default=True,
    metavar="N",
    help="Workers at the start.",
)
@click.option(
    "--blocks",
    "num_blocks",
    type=_count(100_000_000),
    default=_DEFAULT.num_blocks,
    show_default=True,
    metavar="N",
    help="KV blocks of each worker.",
)
@click.option(
    "--host-blocks",
    type=click.IntRange(0, 100_000_000),
    default=0,
    show_default=True,
    metavar="N",
    help="Blocks of host memory of each worker, which evicted ones fall into.",
)
@click.option(
    "--host-gbps",
    type=options.gbps,
    default=_DEFAULT.host_gbps,
    show_default=True,
    metavar="GB/S",
    help="How fast they come back.",
)
@click.option(
    "--disk-blocks",
    type=click.IntRange(0, 100_000_000),
    default=0,
    show_default=True,
    metavar="N",
    help="Blocks of disk of each worker, which those of host memory fall into.",
)
@click.option(
    "--disk-gbps",
    type=options.gbps,
    default=_DEFAULT.disk_gbps,
    show_default=True,
    metavar="GB/S",
    help="How fast they come back.",
)
@click.option(
    "--kv-bytes-per-token",
    type=_count(1 << 30),
    default=_DEFAULT.kv_bytes_per_token,
    show_default=True,
    metavar="BYTES",
    help="What comes back; the default is Llama 3.1 8B in 16 bits.",
)
@click.option(
    "--block-size",
    type=_count(65_536),
    default=_DEFAULT.block_size,
    show_default=True,
    metavar="TOKENS",
    help="Tokens of a KV block.",
)
@click.option(
    "--policy",
    "-p",
    "policies",
    type=options.names(POLICIES),
    multiple=True,
    default=("kv",),
    show_default=True,
    metavar="NAME,…",
    help=f"Routing policies to compare: {', '.join(POLICIES)}.",
)
@click.option(
    "--speed",
    "-s",
    "speeds",
    type=options.speeds,
    multiple=True,
    default=("1",),
    show_default=True,
    metavar="X,…",
    help="Loads to compare: the trace's requests come X times as fast.",
)
@click.option(
    "--timing",
    "--model",
    "timing",
    default=_DEFAULT.timing,
    show_default=True,
    metavar="SPEC",
    help="How long steps take: polynomial (an H100 as Dynamo's mocker has it), "
    "linear:step_ms=10,prefill_ms_per_token=0.1, or "
    "roofline:gpu=h100,model=llama-3.1-70b,dtype=fp8,tp=4.",
)
@click.option(
    "--max-sequences",
    type=_count(65_536),
    default=_DEFAULT.max_sequences,
    show_default=True,
    metavar="N",
    help="Sequences that a worker runs at once.",
)
@click.option(
    "--max-step-tokens",
    type=_count(10_000_000),
    default=_DEFAULT.max_step_tokens,
    show_default=True,
    metavar="N",
    help="Tokens that one step computes; longer prompts go in chunks.",
)
@click.option(
    "--routers",
    "num_routers",
    type=_count(1000),
    default=1,
    show_default=True,
    metavar="N",
    help="Routers that share the requests, each with its own view.",
)
@click.option(
    "--max-waiting",
    "max_waiting_requests",
    type=click.IntRange(0, 10_000_000),
    default=_DEFAULT.max_waiting_requests,
    show_default=True,
    metavar="N",
    help="Requests that wait at a router while all workers are full; more are refused. "
    "0: they wait at the workers.",
)
@click.option(
    "--fail",
    type=options.number_at("WORKER", least=0),
    multiple=True,
    metavar="WORKER@SECONDS",
    help="Kill a worker (the first is 0) that long after the first request. Repeatable.",
)
@click.option(
    "--leave",
    type=options.number_at("WORKER", least=0),
    multiple=True,
    metavar="WORKER@SECONDS",
    help="Drain a worker: it finishes what it has and goes. Repeatable.",
)
@click.option(
    "--restart",
    type=options.number_at("WORKER", least=0),
    multiple=True,
    metavar="WORKER@SECONDS",
    help="Bring back, empty, one that failed or left. Repeatable.",
)
@click.option(
    "--join",
    type=options.number_at("N", least=1),
    multiple=True,
    metavar="N@SECONDS",
    help="Add N new workers. Repeatable.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N requests.")
@click.option(
    "--format", "trace_format", type=click.Choice(list(FORMATS)), help="[recognized by itself]"
)
@click.option(
    "--trace-block-size",
    type=_count(65_536),
    metavar="TOKENS",
    help="Tokens that a hash id stands for. [mooncake: 512, others: 64]",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--jobs",
    "-j",
    type=click.IntRange(1, 256),
    default=min(2, os.cpu_count() or 1),
    show_default="up to 2",
    metavar="N",
    help="Runs at a time, each in a process.",
)
@click.option("--json", "json_path", metavar="FILE", help="Write all figures; - for stdout.")
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw latencies and reuse against load.",
)
def replay(
    trace: str,
    policies: Sequence[Sequence[str]],
    speeds: Sequence[Sequence[float]],
    limit: int | None,
    trace_format: str | None,
    trace_block_size: int | None,
    fail: Sequence[options.At],
    leave: Sequence[options.At],
    restart: Sequence[options.At],
    join: Sequence[options.At],
    jobs: int,
    json_path: str | None,
    plot_path: Path | None,
    **fleet: Any,
) -> None:
    """Replay TRACE through a simulated fleet, in virtual time.

    The real router, scheduler and block manager run over a model of the hardware, so
    that an hour of traffic on a fleet that you don't have takes a minute. Ask it how
    many workers you need, which policy to use, and what a failure costs.

    \b
    TRACE is a file, or a description of made-up traffic:
      mooncake   JSON lines: timestamp, input_length, output_length, hash_ids
      azure      CSV: TIMESTAMP,ContextTokens,GeneratedTokens
      sessions   JSON lines of conversations: {"messages": [{"role", "content"}, …]}
      synthetic:requests=2000,rate=8,prefixes=20,prefix=1500,turns=3,prompt=400,output=200

    \b
    Which policy, and up to what load?
      headrace replay conversation.jsonl --policy kv,round_robin --speed 1,2,4,6,8 \\
          --workers 8 --plot load.png
    How many GPUs does twice the traffic need?
      headrace replay conversation.jsonl --speed 2 --workers 16 \\
          --timing roofline:gpu=h100,model=llama-3.1-70b,dtype=fp8,tp=4
    What does it cost to lose a worker after 5 minutes, until another joins a minute later?
      headrace replay conversation.jsonl --fail 3@300 --join 1@360
    Traffic without shared prefixes:
      headrace replay synthetic:requests=5000,rate=20 --policy kv,least_loaded

    Times of --fail, --leave, --restart and --join count from the first request, in
    the replay's own time (at --speed 2 an hour's trace takes half an hour).
    Equal options give equal figures.
    """
    try:
        _replay(
            trace,
            TraceOptions(trace_format or "", limit or 0, trace_block_size or 0),
            _configs(
                options.unique(policies),
                options.unique(speeds),
                fleet,
                fail=fail,
                leave=leave,
                restart=restart,
                join=join,
            ),
            jobs=jobs,
            json_path=json_path,
            plot_path=plot_path,
        )
    except (HeadraceError, StartupError) as error:
        raise click.ClickException(str(error)) from error


def _configs(
    policies: Sequence[str],
    speeds: Sequence[float],
    fleet: dict[str, Any],
    **events: Sequence[options.At],
) -> list[SimulationConfig]:
    """One for each pair of policy and speed. Raises click.UsageError, InvalidArgument."""
    num_runs = len(policies) * len(speeds)
    if num_runs > MAX_RUNS:
        raise click.UsageError(f"{num_runs} runs (policies times speeds), limit {MAX_RUNS}")
    fleet["router_queue"] = fleet["max_waiting_requests"] > 0
    happenings = options.fleet_events(fleet["num_workers"], **events)
    return [
        SimulationConfig(policy=policy, speed=speed, events=happenings, **fleet)
        for speed in speeds
        for policy in policies
    ]


def _replay(
    source: str,
    trace_options: TraceOptions,
    configs: Sequence[SimulationConfig],
    *,
    jobs: int,
    json_path: str | None,
    plot_path: Path | None,
) -> None:
    writable = [path for path in (json_path, plot_path) if path and path != "-"]
    for path in writable:
        check_writable(Path(path))
    if plot_path:
        from services.replay.plot import check_suffix

        check_suffix(plot_path)
    began = time.monotonic()
    trace = load(source, trace_options)
    for warning in check(trace, configs):
        click.echo(f"Warning: {warning}", err=True)
    with open_progress(trace, configs) as progress:
        results = run_all(trace, configs, jobs, progress)
    reports = [summarize(result) for result in results]
    cost = {"wall_s": time.monotonic() - began, "jobs": jobs}
    console = Console(stderr=json_path == "-", highlight=False, width=_width(json_path))
    console.print(tables(reports), soft_wrap=not console.is_terminal)
    if json_path:
        write(json_path, document(source, trace, trace_options, reports, cost))
    if plot_path:
        from services.replay.plot import plot

        plot(reports, plot_path, title=_title(source, trace, configs[0]))


def _width(json_path: str | None) -> int | None:
    """What is no terminal gets whole rows."""
    stream = sys.stderr if json_path == "-" else sys.stdout
    return None if stream.isatty() else _WIDTH


def _title(source: str, trace: Trace, config: SimulationConfig) -> str:
    name = source if source.startswith("synthetic:") else Path(source).name
    return (
        f"{name}: {len(trace.requests):,} requests, {config.num_workers} workers of "
        f"{config.num_blocks:,} × {config.block_size} tokens, {config.timing}"
    )


def main(prog_name: str) -> None:
    """Run the command; exits."""
    command: Callable[..., Any] = replay
    command(prog_name=prog_name)
