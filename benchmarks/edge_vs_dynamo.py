"""Does our edge cost less than Dynamo's Rust frontend?

Both serve the same model directory with two simulated workers that take the times of
Dynamo's mocker, on one machine in one run, in turn, to the same clients: ours is gateway,
tokenizer and router together, theirs the frontend; neither's workers are counted. A Rust
proxy that neither tokenizes nor detokenizes, vllm-router, stands before workers that
stream at the same rates.

    python benchmarks/edge_vs_dynamo.py [--quick]

Dynamo and the proxy are set up once under `.bench/`, by pip.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.dynamo import DYNAMO, install
from harness.dynamo_mesh import DynamoMesh
from harness.edge import (
    MODEL,
    NUM_CLIENTS,
    NUM_WORKERS,
    RATES,
    SHAPE,
    Run,
    connect,
    measure_once,
    rounds,
)
from harness.huggingface import write_model
from harness.idle import memory_per_stream
from harness.latency import measure_latencies, percentile
from harness.mesh import Mesh
from harness.proxy import VLLM_ROUTER, ProxyMesh, install_proxy
from harness.report import Spread, last_line, table, versions

if TYPE_CHECKING:
    from harness.load import Load, Shape
    from harness.processes import Processes

BENCH = Path(__file__).resolve().parents[1] / ".bench"
FOLDER = BENCH / "edge_vs_dynamo"
BLOCK_SIZE = 16
#: The mocker's: what a worker holds, runs at once, and computes in a step.
LIMITS = ["--num-blocks", "16384", "--max-sequences", "256", "--max-step-tokens", "8192"]
#: By how much the mocker's times are divided for about such a rate.
SPEEDUPS = dict(zip(RATES, (0.5, 2.0, 4.0), strict=True))
NAMES = dict(zip(RATES, ("2k", "7k", "13k"), strict=True))
#: Prompts in characters, of requests that bring one token.
PROMPTS = (2200, 40000)
SIDES = ("ours http", "ours grpc", "dynamo", "vllm-router")
#: Milliseconds between a stream's tokens, streams, and tokens of each, for jitter.
STEP_MS, NUM_STREAMS, STREAM_TOKENS = 20.0, 64, 150
#: The mocker's decode step, with next to nothing in its KV cache.
MOCKER_STEP_MS = 5.74
IDLE_STREAMS = 400


@dataclass(frozen=True)
class Peers:
    """Where Dynamo and the proxy are, and the model that all serve."""

    dynamo: Path
    proxy: Path
    model: Path


def our_mesh(peers: Peers, timing: str, name: str) -> Mesh:
    """Ours, with simulated workers of that timing model."""
    return Mesh(
        model=f"{MODEL}={peers.model}",
        num_workers=NUM_WORKERS,
        worker_flags=[
            *("--engine", "sim", "--block-size", str(BLOCK_SIZE), "--sim-timing", timing, *LIMITS),
        ],
        folder=FOLDER / f"ours-{name}",
    )


def their_mesh(peers: Peers, flags: list[str], name: str) -> DynamoMesh:
    """Dynamo's, with such a mocker."""
    return DynamoMesh(
        peers.dynamo,
        model=MODEL,
        model_path=peers.model,
        num_workers=NUM_WORKERS,
        block_size=BLOCK_SIZE,
        mocker_flags=flags,
        folder=FOLDER / f"dynamo-{name}",
    )


def both(stack: ExitStack, peers: Peers, speedup: float) -> tuple[Mesh, DynamoMesh]:
    """Both, started, at the mocker's times divided by `speedup`."""
    mine = stack.enter_context(our_mesh(peers, f"polynomial:speedup={speedup:g}", f"{speedup:g}"))
    flags = ["--speedup-ratio", f"{speedup:g}"]
    return mine, stack.enter_context(their_mesh(peers, flags, f"{speedup:g}"))


def per_token(peers: Peers, rate: int, *, seconds: float, repeats: int) -> dict[str, list[Run]]:
    """All sides in turn, `repeats` times, at about `rate` tokens a second."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        mine, other = both(stack, peers, SPEEDUPS[rate])
        proxy = stack.enter_context(
            ProxyMesh(
                peers.proxy,
                model=MODEL,
                num_workers=NUM_WORKERS,
                step_ms=1000 * NUM_CLIENTS / rate,
                folder=FOLDER / f"proxy-{rate}",
            )
        )
        kinds = ("http", "grpc", "http", "http")
        targets = (mine.http, mine.grpc, other.http, proxy.http)
        sides: dict[str, tuple[Processes, Load]] = {
            side: (processes, stack.enter_context(connect(kind, target)))
            for side, kind, target, processes in zip(
                SIDES, kinds, targets, (mine, mine, other, proxy), strict=True
            )
        }
        for _ in range(repeats):
            for side, (processes, load) in sides.items():
                runs[side].append(measure_once(processes, load, rounds(rate, seconds)))
    return runs


def per_request(peers: Peers, shape: Shape, *, num_rounds: int, repeats: int) -> list[list[Run]]:
    """Ours and Dynamo's in turn, of requests that bring one token."""
    runs: list[list[Run]] = [[], []]
    with ExitStack() as stack:
        meshes = both(stack, peers, SPEEDUPS[RATES[-1]])
        loads = [stack.enter_context(connect("http", mesh.http, shape)) for mesh in meshes]
        for _ in range(repeats):
            for found, mesh, load in zip(runs, meshes, loads, strict=True):
                found.append(measure_once(mesh, load, num_rounds))
    return runs


def added_ttft(peers: Peers, num_requests: int) -> dict[str, float]:
    """TTFT in ms of one client, where workers take no time."""
    shape = replace(SHAPE, num_tokens=2)
    figures = {}
    meshes: dict[str, Processes] = {
        "": our_mesh(peers, "linear:step_ms=0,prefill_ms_per_token=0", "zero"),
        "dynamo_": their_mesh(peers, ["--speedup-ratio", "100000"], "zero"),
    }
    for who, mesh in meshes.items():
        with mesh:
            found = measure_latencies(mesh.http, shape, num_clients=1, num_rounds=num_requests)
            for percent in (50, 99):
                figures[f"{who}ttft_added_p{percent}_ms"] = percentile(found.ttft_ms, percent)
    return figures


def added_jitter(peers: Peers) -> dict[str, float]:
    """How far gaps between tokens are from the workers' step, in ms."""
    shape = replace(SHAPE, prompt_len=200, num_tokens=STREAM_TOKENS)
    figures = {}
    meshes: dict[str, Processes] = {
        "": our_mesh(peers, f"linear:step_ms={STEP_MS:g},prefill_ms_per_token=0", "steady"),
        "dynamo_": their_mesh(
            peers,
            ["--speedup-ratio", "1000", "--decode-speedup-ratio",
             f"{MOCKER_STEP_MS / STEP_MS / 1000:.6f}"],
            "steady",
        ),
    }  # fmt: skip
    for who, mesh in meshes.items():
        with mesh:
            found = measure_latencies(mesh.http, shape, num_clients=NUM_STREAMS, num_rounds=1)
            far = [abs(gap - STEP_MS) for gap in found.gaps_ms]
            figures[f"{who}jitter_p50_ms"] = percentile(far, 50)
            figures[f"{who}jitter_p99_ms"] = percentile(far, 99)
    return figures


def idle_memory(peers: Peers) -> dict[str, float]:
    """Memory in kB of the processes between client and workers, per stream that is silent."""
    figures = {}
    step_ms = 8000
    meshes: dict[str, Processes] = {
        "": our_mesh(peers, f"linear:step_ms={step_ms},prefill_ms_per_token=0", "idle"),
        "dynamo_": their_mesh(
            peers,
            ["--speedup-ratio", "1000", "--decode-speedup-ratio",
             f"{MOCKER_STEP_MS / step_ms / 1000:.9f}"],
            "idle",
        ),
    }  # fmt: skip
    for who, mesh in meshes.items():
        with mesh:
            shape = replace(SHAPE, prompt_len=200)
            figures[f"{who}idle_stream_kb"] = memory_per_stream(mesh, shape, IDLE_STREAMS)
    return figures


def show_tokens(found: dict[int, dict[str, list[Run]]]) -> None:
    """CPU per token, a row for each side and rate."""
    rows = []
    for rate, runs in found.items():
        base = Spread.of([run.edge for run in runs["dynamo"]]).median
        for side, mine in runs.items():
            cost = Spread.of([run.edge for run in mine])
            rows.append([
                f"{NAMES[rate]}: {side}",
                f"{Spread.of([run.rate for run in mine]).median:.0f}",
                cost, f"{cost.median / base:.2f}",
                f"{Spread.of([run.tokens_per_event for run in mine]).median:.2f}",
            ])  # fmt: skip
    header = ["CPU per streamed token, µs", "tokens/s", "median (low–high)", "to Dynamo"]
    print(table([*header, "tokens/event"], rows))


def token_figures(
    found: dict[int, dict[str, list[Run]]],
) -> tuple[dict[str, float], dict[str, object]]:
    """Ratios and figures by name."""
    ratios: dict[str, float] = {}
    figures: dict[str, object] = {}
    for rate, runs in found.items():
        cost = {side: Spread.of([run.edge for run in runs[side]]) for side in SIDES}
        name = NAMES[rate]
        ratios |= {
            f"cpu_per_token_vs_dynamo_{name}": cost["ours http"].median / cost["dynamo"].median,
            f"grpc_cpu_per_token_vs_dynamo_{name}": cost["ours grpc"].median
            / cost["dynamo"].median,
            f"cpu_per_token_vs_vllm_router_{name}": cost["ours http"].median
            / cost["vllm-router"].median,
        }
        for side in SIDES:
            spread, label = cost[side], side.replace(" ", "_").replace("-", "_")
            figures[f"{label}_cpu_us_per_token_{name}"] = _figure(spread)
            figures[f"{label}_tokens_per_s_{name}"] = round(
                Spread.of([run.rate for run in runs[side]]).median
            )
    return ratios, figures


def _figure(spread: Spread) -> list[float]:
    return [round(value, 2) for value in (spread.median, spread.low, spread.high)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under 60 s: fewer and shorter runs")
    quick = parser.parse_args().quick
    peers = Peers(
        install(BENCH / "dynamo"),
        install_proxy(BENCH / "vllm_router"),
        write_model(FOLDER / MODEL),
    )
    print(
        f"{NUM_CLIENTS} clients, {SHAPE.prompt_len} characters in, {SHAPE.num_tokens} tokens out; "
        f"{NUM_WORKERS} workers with the mocker's times; {os.cpu_count()} cores.\n"
        f"ours: gateway + tokenizer + router. Dynamo {DYNAMO}: frontend, --router-mode kv, blocks "
        f"of {BLOCK_SIZE}. vllm-router {VLLM_ROUTER}: cache_aware, mock workers.\n"
    )
    seconds, repeats = (1.0, 1) if quick else (5.0, 5)
    tokens = {
        rate: per_token(peers, rate, seconds=seconds, repeats=repeats)
        for rate in (RATES[1:2] if quick else RATES)
    }
    show_tokens(tokens)
    ratios, figures = token_figures(tokens)
    rows = []
    for prompt_len in PROMPTS:
        shape = replace(SHAPE, prompt_len=prompt_len, num_tokens=1)
        num_rounds = max(1, (4 if quick else 20) * PROMPTS[0] // prompt_len)
        runs = per_request(peers, shape, num_rounds=num_rounds, repeats=repeats)
        costs = [Spread.of([run.edge_per_request / 1000 for run in side]) for side in runs]
        ratio = costs[0].median / costs[1].median
        ratios[f"cpu_per_request_vs_dynamo_{prompt_len}"] = ratio
        rows.append([f"{prompt_len} characters", *costs, f"{ratio:.2f}"])
        for who, cost in zip(("", "dynamo_"), costs, strict=True):
            figures[f"{who}cpu_ms_per_request_{prompt_len}"] = _figure(cost)
    print()
    print(table(["CPU per request of one token, ms", "ours", "Dynamo", "ratio"], rows))
    if not quick:
        other = added_ttft(peers, 400) | added_jitter(peers) | idle_memory(peers)
        figures |= {name: round(value, 2) for name, value in other.items()}
        names = [name for name in other if not name.startswith("dynamo_")]
        print()
        print(table(
            ["added by what stands between", "ours", "Dynamo"],
            [[n, f"{other[n]:.2f}", f"{other[f'dynamo_{n}']:.2f}"] for n in names],
        ))  # fmt: skip
    used = versions("aiohttp", "grpcio", "msgspec", "uvloop")
    print(
        last_line(
            "edge_vs_dynamo",
            ratios={name: round(value, 3) for name, value in ratios.items()},
            figures=figures,
            versions=used | {"ai-dynamo": DYNAMO, "vllm-router": VLLM_ROUTER},
        )
    )


if __name__ == "__main__":
    main()
