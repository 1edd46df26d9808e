"""What does a streamed token cost the edge?

Process CPU per token of the gateway, and of gateway, tokenizer and router together,
while clients stream over HTTP (SSE) and gRPC from two `sim` workers at several token
rates. Real services, real connections; only the model's arithmetic is simulated.

    python benchmarks/edge_cost.py [--quick] [--profile]
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from harness.edge import (
    MODEL,
    NUM_CLIENTS,
    NUM_WORKERS,
    RATES,
    SHAPE,
    connect,
    measure_once,
    rounds,
)
from harness.mesh import Mesh
from harness.profile import profile
from harness.report import Spread, last_line, table, versions

if TYPE_CHECKING:
    from harness.edge import Run

KINDS = ("http", "grpc")
#: Prefill is not what is asked about: 500 tokens take 0.5 ms.
PREFILL_MS_PER_TOKEN = 0.001
FOLDER = Path(__file__).resolve().parents[1] / ".bench" / "edge_cost"


def mesh_at(rate: int) -> Mesh:
    """A mesh whose workers make about `rate` tokens a second for all clients together."""
    flags = [
        *("--engine", "sim", "--sim-step-ms", f"{1000 * NUM_CLIENTS / rate:.3f}"),
        *("--sim-prefill-ms-per-token", str(PREFILL_MS_PER_TOKEN)),
    ]
    return Mesh(
        model=MODEL, num_workers=NUM_WORKERS, worker_flags=flags, folder=FOLDER / f"logs-{rate}"
    )


def targets(mesh: Mesh) -> dict[str, str]:
    """Where each kind of client connects."""
    return {"http": mesh.http, "grpc": mesh.grpc}


def measure(rate: int, *, seconds: float, repeats: int) -> dict[str, list[Run]]:
    """HTTP and gRPC in turn, `repeats` times, on one mesh."""
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        mesh = stack.enter_context(mesh_at(rate))
        loads = {kind: stack.enter_context(connect(kind, targets(mesh)[kind])) for kind in KINDS}
        for _ in range(repeats):
            for kind, load in loads.items():
                runs[kind].append(measure_once(mesh, load, rounds(rate, seconds)))
    return runs


def figures_of(runs: list[Run]) -> dict[str, Spread]:
    """What repeated runs say together."""
    return {
        "tokens_per_s": Spread.of([run.rate for run in runs]),
        "gateway_cpu_us_per_token": Spread.of([run.cost["gateway"] for run in runs]),
        "edge_cpu_us_per_token": Spread.of([run.edge for run in runs]),
        "tokenizer_cpu_us_per_token": Spread.of([run.cost["tokenizer"] for run in runs]),
        "router_cpu_us_per_token": Spread.of([run.cost["router"] for run in runs]),
        "workers_cpu_us_per_token": Spread.of([run.workers for run in runs]),
        "tokens_per_event": Spread.of([run.tokens_per_event for run in runs]),
    }


def report(found: dict[tuple[str, int], dict[str, Spread]], repeats: int) -> None:
    """The table and the last line."""
    print(
        f"Process CPU per streamed token in µs, median (low–high) of {repeats} runs; "
        f"{NUM_CLIENTS} clients, prompts of {SHAPE.prompt_len} characters, "
        f"{SHAPE.num_tokens} tokens out, {NUM_WORKERS} sim workers, {os.cpu_count()} cores.\n"
        "edge = gateway + tokenizer + router; every stream brought all its tokens.\n"
    )
    rows = [
        [
            f"{kind} at {rate}/s",
            *(f"{figures['tokens_per_s'].median:.0f}",),
            *(figures[f"{name}_cpu_us_per_token"] for name in ("gateway", "edge")),
            *(figures[f"{name}_cpu_us_per_token"] for name in ("tokenizer", "router", "workers")),
            f"{figures['tokens_per_event'].median:.2f}",
        ]
        for (kind, rate), figures in found.items()
    ]
    header = ["client", "tokens/s", "gateway", "edge", "tokenizer", "router", "workers"]
    print(table([*header, "tokens/event"], rows))
    flat = {
        f"{kind}_{rate}_{name}": [round(s.median, 2), round(s.low, 2), round(s.high, 2)]
        for (kind, rate), figures in found.items()
        for name, s in figures.items()
    }
    used = versions("aiohttp", "grpcio", "msgspec", "protobuf", "uvloop")
    print(last_line("edge_cost", ratios={}, figures=flat, versions=used))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under 60 s, with more spread")
    parser.add_argument("--profile", action="store_true", help="sample the gateway instead")
    parser.add_argument("--kind", choices=KINDS, default="http", help="clients to profile with")
    given = parser.parse_args()
    if given.profile:
        rate = RATES[1]
        with mesh_at(rate) as mesh:
            target = targets(mesh)[given.kind]
            with connect(given.kind, target) as load:
                pid = mesh.processes["gateway"].pid
                profile(pid, lambda: load.run(rounds(rate, 12)), FOLDER, seconds=10)
        return
    seconds, repeats = (1.5, 2) if given.quick else (6.0, 5)
    found: dict[tuple[str, int], dict[str, Spread]] = {}
    for rate in RATES:
        runs = measure(rate, seconds=seconds, repeats=repeats)
        found |= {(kind, rate): figures_of(runs[kind]) for kind in KINDS}
    report(found, repeats)


if __name__ == "__main__":
    main()
