"""Does our choice of workers beat Dynamo's, on the same trace with the same engine model?

Both replay the Mooncake conversation trace in virtual time: 8 workers of 16,384 blocks of
64 tokens, at most 256 sequences and 8,192 tokens a step, step times by Dynamo's mocker
polynomial. First both with round robin, which says how alike the simulated engines are;
then our `kv` beside Dynamo's `kv_router` on those engines. At last, requests that share nothing
(a piece of Azure's conversation trace, which tells no content): our `kv` beside our
`least_loaded`.

    python benchmarks/router_vs_dynamo.py [--quick]

Dynamo is set up once under `.bench/dynamo`, by pip.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.dynamo import DYNAMO, ReplayJob, install, replay
from harness.report import last_line, table, versions

from services.replay.report import Report, summarize
from services.replay.runs import run_all
from services.replay.simulation import SimulationConfig
from services.replay.traces import TraceOptions, load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.replay.workload import Trace

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
TRACE = ROOT / "benchmarks" / "data" / "mooncake_conversation_trace.jsonl"
TRACE_BLOCK_SIZE = 512
NUM_WORKERS = 8
NUM_BLOCKS = 16384
BLOCK_SIZE = 64
#: Ours beside theirs.
ROUND_ROBIN = ("round_robin", "round_robin")
KV = ("kv", "kv_router")
SPEEDS = {ROUND_ROBIN: (1, 2, 4, 6, 8), KV: (4, 6, 8)}
#: Its kv_router breaks ties at random: medians of some runs.
KV_RUNS = 3
QUICK_SPEED, QUICK_REQUESTS = 6, 2000
SINGLE_TURN = TRACE.with_name("azure_llm_2023_conv.csv")
SINGLE_TURN_REQUESTS, SINGLE_TURN_SPEEDS = 6000, (10, 20)


@dataclass(frozen=True)
class Outcome:
    """What is compared. Times in ms."""

    mean_ttft: float
    p50_ttft: float
    p90_ttft: float
    p99_ttft: float
    itl_p95: float
    requests_per_s: float
    reuse: float
    #: TTFT of every request alone on an idle worker with the reuse it had; 0: not known.
    floor_mean: float = 0.0
    floor_p99: float = 0.0


@dataclass(frozen=True)
class Case:
    """One policy of each at one speed."""

    policies: tuple[str, str]
    speed: int

    @property
    def config(self) -> SimulationConfig:
        """How we replay it."""
        return SimulationConfig(
            num_workers=NUM_WORKERS,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            policy=self.policies[0],
            speed=self.speed,
        )

    def job(self, trace: Path) -> ReplayJob:
        """How Dynamo does."""
        return ReplayJob(
            trace=str(trace),
            router_mode=self.policies[1],
            speed=self.speed,
            num_workers=NUM_WORKERS,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            trace_block_size=TRACE_BLOCK_SIZE,
        )


def their_outcome(found: dict[str, Any]) -> Outcome:
    """Of a summary of Dynamo's."""
    return Outcome(
        mean_ttft=found["mean_ttft_ms"],
        p50_ttft=found["median_ttft_ms"],
        p90_ttft=found["p90_ttft_ms"],
        p99_ttft=found["p99_ttft_ms"],
        itl_p95=found["p95_itl_ms"],
        requests_per_s=found["request_throughput_rps"],
        # As we count it: what a request found when it first started.
        reuse=found["first_admission_prefix_cache_reused_ratio"],
    )


def our_outcome(report: Report) -> Outcome:
    """Of a report of ours."""
    return Outcome(
        mean_ttft=report.ttft.mean,
        p50_ttft=report.ttft.p50,
        p90_ttft=report.ttft.p90,
        p99_ttft=report.ttft.p99,
        itl_p95=report.itl.p95,
        requests_per_s=report.requests_per_s,
        reuse=report.reuse_ratio,
        floor_mean=report.floor_ttft.mean,
        floor_p99=report.floor_ttft.p99,
    )


def median_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Figure by figure."""
    fields = Outcome.__dataclass_fields__
    return Outcome(*(statistics.median(getattr(o, name) for o in outcomes) for name in fields))


def theirs(python: Path, path: Path, cases: Sequence[Case], trace: Trace) -> dict[Case, Outcome]:
    """Dynamo's replays, all checked to be of the whole trace."""
    runs = [case for case in cases for _ in range(KV_RUNS if case.policies == KV else 1)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda case: replay(python, case.job(path)), runs))
    for summary in found:
        check_work(
            "Dynamo", trace,
            (summary["num_requests"], summary["total_input_tokens"],
             summary["total_output_tokens"]),
        )  # fmt: skip
    return {
        case: median_of([their_outcome(s) for c, s in zip(runs, found, strict=True) if c == case])
        for case in cases
    }


def ours(cases: Sequence[Case], trace: Trace) -> dict[Case, Outcome]:
    """Our replays, all checked to be of the whole trace."""

    def progress(run: int, ended: int, of: int) -> None:
        if ended == of:
            case = cases[run]
            print(f"  {case.policies[0]} ×{case.speed} done", file=sys.stderr, flush=True)

    results = run_all(trace, [case.config for case in cases], os.cpu_count() or 1, progress)
    outcomes = {}
    for case, result in zip(cases, results, strict=True):
        report = summarize(result)
        done = (report.completed, int(result.prompt_tokens.sum()), int(result.output_tokens.sum()))
        check_work("Headrace", trace, done)
        outcomes[case] = our_outcome(report)
    return outcomes


def check_work(who: str, trace: Trace, done: tuple[int, int, int]) -> None:
    """Raises AssertionError unless requests, prompt tokens and output tokens are the trace's."""
    asked = (
        len(trace.requests),
        sum(request.num_tokens for request in trace.requests),
        sum(request.output_tokens for request in trace.requests),
    )
    assert done == asked, f"{who} did {done} requests, prompt and output tokens, not {asked}"


def show(cases: Sequence[Case], mine: dict[Case, Outcome], other: dict[Case, Outcome]) -> None:
    """The table for people."""
    rows = []
    for case in cases:
        a, b = mine[case], other[case]
        for who, policy, o in (("Headrace", 0, a), ("Dynamo", 1, b)):
            rows.append([
                f"×{case.speed} {who} {case.policies[policy]}",
                *(f"{v:,.0f}" for v in (o.mean_ttft, o.p50_ttft, o.p90_ttft, o.p99_ttft)),
                f"{o.itl_p95:.1f}", f"{o.requests_per_s:.2f}", f"{100 * o.reuse:.1f} %",
            ])  # fmt: skip
        rows.append([
            "   ratio",
            *(f"{x / y:.3f}" for x, y in (
                (a.mean_ttft, b.mean_ttft), (a.p50_ttft, b.p50_ttft), (a.p90_ttft, b.p90_ttft),
                (a.p99_ttft, b.p99_ttft), (a.itl_p95, b.itl_p95),
                (a.requests_per_s, b.requests_per_s), (a.reuse, b.reuse),
            )),
        ])  # fmt: skip
        rows.append(["   floor", f"{a.floor_mean:,.0f}", "", "", f"{a.floor_p99:,.0f}", *[""] * 3])
    header = ["", "TTFT mean", "p50", "p90", "p99", "ITL p95", "requests/s", "reuse"]
    print(table(header, rows))
    print("\nfloor: our requests each alone on an idle worker, with the reuse that they had.")


def ratios_of(
    cases: Sequence[Case], mine: dict[Case, Outcome], other: dict[Case, Outcome]
) -> dict[str, float]:
    """Ours / theirs, by name."""
    found: dict[str, float] = {}
    for case in cases:
        start = "round_robin_" if case.policies == ROUND_ROBIN else ""
        a, b, end = mine[case], other[case], f"vs_dynamo_x{case.speed}"
        found |= {
            f"{start}mean_ttft_{end}": a.mean_ttft / b.mean_ttft,
            f"{start}p99_ttft_{end}": a.p99_ttft / b.p99_ttft,
            f"{start}itl_p95_{end}": a.itl_p95 / b.itl_p95,
            f"{start}throughput_speed_{end}": a.requests_per_s / b.requests_per_s,
            f"{start}reuse_{end}": a.reuse / b.reuse,
        }
    return {name: round(float(value), 4) for name, value in found.items()}


def figures_of(cases: Sequence[Case], who: str, found: dict[Case, Outcome]) -> dict[str, float]:
    """What was measured, by name."""
    figures = {}
    for case in cases:
        start = "round_robin_" if case.policies == ROUND_ROBIN else ""
        for name in Outcome.__dataclass_fields__:
            value = getattr(found[case], name)
            if value:
                figures[f"{who}{start}{name}_x{case.speed}"] = round(float(value), 4)
    return figures


def single_turn() -> tuple[dict[str, float], dict[str, float]]:
    """Ratios of our `kv` to our `least_loaded` where nothing is shared, and figures."""
    trace = load(str(SINGLE_TURN), TraceOptions(limit=SINGLE_TURN_REQUESTS))
    cases = [(p, s) for s in SINGLE_TURN_SPEEDS for p in ("kv", "least_loaded")]
    configs = [
        SimulationConfig(
            num_workers=NUM_WORKERS, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE,
            policy=policy, speed=speed,
        )
        for policy, speed in cases
    ]  # fmt: skip
    results = run_all(trace, configs, os.cpu_count() or 1, lambda *_: None)
    reports = dict(zip(cases, map(summarize, results), strict=True))
    print(f"\n{SINGLE_TURN.name}: the first {len(trace.requests):,} requests, nothing shared\n")
    print(table(
        ["", "TTFT mean", "p50", "p90", "p99", "ITL p95"],
        [
            [f"×{speed} {policy}", *(f"{value:,.1f}" for value in (
                report.ttft.mean, report.ttft.p50, report.ttft.p90, report.ttft.p99,
                report.itl.p95,
            ))]
            for (policy, speed), report in reports.items()
        ],
    ))  # fmt: skip
    ratios, figures = {}, {}
    for speed in SINGLE_TURN_SPEEDS:
        for name in ("mean", "p99"):
            kv, least = (
                getattr(reports[policy, speed].ttft, name) for policy in ("kv", "least_loaded")
            )
            ratios[f"single_turn_{name}_ttft_vs_least_loaded_x{speed}"] = round(kv / least, 4)
            figures[f"single_turn_{name}_ttft_x{speed}"] = round(kv, 2)
    return ratios, figures


def shortened(path: Path, num_requests: int) -> Path:
    """A file with the trace's first requests."""
    short = BENCH / f"mooncake_{num_requests}.jsonl"
    with path.open() as file, short.open("w") as out:
        out.writelines(line for line, _ in zip(file, range(num_requests), strict=False))
    return short


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    quick = f"the first {QUICK_REQUESTS:,} requests at ×{QUICK_SPEED} alone"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--trace", type=Path, default=TRACE, help="another trace of that form")
    given = parser.parse_args()
    BENCH.mkdir(exist_ok=True)
    path = shortened(given.trace, QUICK_REQUESTS) if given.quick else given.trace
    trace = load(str(path), TraceOptions(format="mooncake", trace_block_size=TRACE_BLOCK_SIZE))
    cases = [
        Case(policies, speed)
        for policies, speeds in SPEEDS.items()
        for speed in (speeds if not given.quick else (QUICK_SPEED,))
    ]
    python = install(BENCH / "dynamo")
    print(
        f"{path.name}: {len(trace.requests):,} requests; {NUM_WORKERS} workers of "
        f"{NUM_BLOCKS:,} blocks of {BLOCK_SIZE} tokens, 256 sequences and 8,192 tokens a step.\n"
        f"Dynamo {DYNAMO}: run_trace_replay, KvRouterConfig(), mocker defaults; median of "
        f"{KV_RUNS} runs of kv_router.\nHeadrace: {cases[0].config}\n"
    )
    start = time.perf_counter()
    other = theirs(python, path, cases, trace)
    between = time.perf_counter()
    mine = ours(cases, trace)
    show(cases, mine, other)
    figures = figures_of(cases, "", mine) | figures_of(cases, "dynamo_", other)
    figures |= {
        "replays_wall_s": round(time.perf_counter() - between, 1),
        "dynamo_replays_wall_s": round(between - start, 1),
    }
    ratios = ratios_of(cases, mine, other)
    if not given.quick:
        more_ratios, more_figures = single_turn()
        ratios |= more_ratios
        figures |= more_figures
    print(
        last_line(
            "router_vs_dynamo",
            ratios=ratios,
            figures=figures,
            versions=versions("headrace", "numpy") | {"ai-dynamo": DYNAMO},
        )
    )


if __name__ == "__main__":
    main()
