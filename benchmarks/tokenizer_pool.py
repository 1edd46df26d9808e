"""Do long documents delay short requests? Latencies of the tokenizer service under loads.

Starts `python -m services.tokenizer` and asks it over one stream, as a gateway does,
for 200-character texts, one after the other with short pauses, while another process

    idle         does nothing
    documents    streams documents of 1 MB from two clients, each the next when one is done
    burst        sends 40 documents of 40 kB at once, again and again
    batch        sends 2,048 sentences as one batch, again and again

Every answer must be there. Ratios: the 99th percentile under a load by the idle one,
which is measured before each load. On machines of two cores the load's own process and
the service's share them with the pool's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
from harness.report import last_line, table, versions

from headrace import status
from headrace.registry import ModelCard
from headrace.rpc import options
from headrace.v1 import tokenizer_pb2 as pb
from headrace.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from services.gateway.generation import GenerationRequest
from services.gateway.peers.tokenizer import TokenizerPeer

_MODEL = "smollm2-135m"
_CARD = ModelCard(_MODEL, "", "", 1 << 20, 16)
_LOADS = ("documents", "burst", "batch")
_DOCUMENT_LEN, _BURST_LEN, _BURST_SIZE, _BATCH_SIZE = 1_000_000, 40_000, 40, 2048
_PAUSE_S = 0.002
_TIMEOUT_S = 120.0


def prose(rng: random.Random, length: int) -> str:
    """`length` characters of words, of which some are new every time."""
    common = ["the", "water", "of", "wheel", "turns", "and", "river", "stone", "in", "power"]
    parts: list[str] = []
    left = length
    while left > 0:
        word = rng.choice(common) if rng.random() < 0.9 else f"{rng.getrandbits(24):x}"
        parts.append(word)
        left -= len(word) + 1
    return " ".join(parts)[:length]


async def latencies(peer: TokenizerPeer, count: int, seed: int) -> list[float]:
    """Milliseconds of `count` short requests."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        text = prose(rng, 200)
        started = time.perf_counter()
        await encode(peer, text, f"s{number}")
        found.append((time.perf_counter() - started) * 1e3)
        await asyncio.sleep(_PAUSE_S)
    return sorted(found)


async def encode(peer: TokenizerPeer, text: str, name: str) -> None:
    request = GenerationRequest(name, _MODEL, prompt=text)
    answer = await peer.encode(request, _CARD, b"", timeout_s=_TIMEOUT_S)
    assert answer.num_tokens


async def load(kind: str, address: str) -> None:
    """Load the service until the standard input ends; a line is printed when it begins."""
    # It stands for other machines: its own work must not delay what is measured.
    os.nice(10)
    rng = random.Random(kind)
    documents = [prose(rng, _DOCUMENT_LEN) for _ in range(6)]
    peer = TokenizerPeer(address, timeout_s=_TIMEOUT_S)
    peer.start()
    loop = asyncio.get_running_loop()
    ended = loop.run_in_executor(None, sys.stdin.read)
    rounds = {"documents": _documents, "burst": _burst, "batch": _batch}[kind]
    print("begins", flush=True)
    count, started = 0, time.perf_counter()
    async with grpc.aio.insecure_channel(address, options=options.CHANNEL) as channel:
        while not ended.done():
            await rounds(peer, TokenizerServiceStub(channel), documents, count)
            count += 1
    print(count / (time.perf_counter() - started), flush=True)
    await peer.close()


async def _documents(
    peer: TokenizerPeer, _stub: TokenizerServiceStub, texts: list[str], count: int
) -> None:
    async def client(first: int) -> None:
        for number in range(3):
            await encode(peer, texts[(first + number + count) % len(texts)], "d")

    await asyncio.gather(client(0), client(3))


async def _burst(
    peer: TokenizerPeer, _stub: TokenizerServiceStub, texts: list[str], count: int
) -> None:
    text = texts[count % len(texts)]
    starts = [(start * 7919) % (_DOCUMENT_LEN - _BURST_LEN) for start in range(_BURST_SIZE)]
    await asyncio.gather(*(encode(peer, text[s : s + _BURST_LEN], "b") for s in starts))


async def _batch(
    _peer: TokenizerPeer, stub: TokenizerServiceStub, texts: list[str], count: int
) -> None:
    text = texts[count % len(texts)].encode()
    sentences = [text[i * 100 : i * 100 + 100] for i in range(_BATCH_SIZE)]
    answer = await stub.EncodeBatch(pb.EncodeBatchRequest(model=_MODEL, texts=sentences))
    assert len(answer.counts) == 4 * _BATCH_SIZE


class Service:
    """`python -m services.tokenizer` on a free port."""

    def __init__(self, processes: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.status = Path(f".bench/tokenizer-{os.getpid()}")
        self.status.parent.mkdir(exist_ok=True)
        flags = ["--model", _MODEL, "--listen", self.address, "--processes", str(processes)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.tokenizer", *flags],
            env={**os.environ, status.VARIABLE: str(self.status)},
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Service:
        while True:
            progress = status.read(self.status)
            if progress is not None and progress.phase == status.READY:
                return self
            if self.process.poll() is not None:
                raise RuntimeError("the tokenizer service did not start")
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.status.unlink(missing_ok=True)


async def measure(address: str, count: int) -> dict[str, tuple[list[float], list[float], float]]:
    """By load: latencies idle and loaded, rounds of the load per second."""
    peer = TokenizerPeer(address, timeout_s=_TIMEOUT_S)
    peer.start()
    await latencies(peer, 300, seed=0)
    found = {}
    for kind in _LOADS:
        idle = await latencies(peer, count, seed=1)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "--load", kind, "--address", address),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdout.readline()
        loaded = await latencies(peer, count, seed=2)
        process.stdin.close()
        found[kind] = idle, loaded, float(await process.stdout.readline())
        await process.wait()
    await peer.close()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--processes", type=int, default=0, help="0: the service's default")
    parser.add_argument("--load", choices=_LOADS, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        asyncio.run(load(args.load, args.address))
        return
    with Service(args.processes) as service:
        found = asyncio.run(measure(service.address, 800 if args.quick else 4000))
    rows, ratios, figures = [], {}, {}
    for kind, (idle, loaded, rate) in found.items():
        before, after = _percentiles(idle), _percentiles(loaded)
        ratios[f"short_p99_{kind}_vs_idle"] = round(after[1] / before[1], 2)
        figures[f"{kind}_ms"] = {"idle_p50_p99": before, "loaded_p50_p99": after}
        figures[f"{kind}_rounds_s"] = round(rate, 2)
        rows.append([kind, *before, *after, f"{after[1] / before[1]:.1f}", f"{rate:.2f}"])
    header = ["load", "idle p50 ms", "p99", "loaded p50 ms", "p99", "ratio of p99", "rounds/s"]
    print(table(header, rows))
    found_versions = versions("grpcio", "msgspec", "regex")
    print(last_line("tokenizer_pool", ratios=ratios, figures=figures, versions=found_versions))


def _percentiles(values: list[float]) -> tuple[float, float]:
    return round(values[len(values) // 2], 2), round(values[len(values) * 99 // 100], 2)


if __name__ == "__main__":
    main()
