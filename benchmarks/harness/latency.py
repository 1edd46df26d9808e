"""HTTP clients that note when each token came, in a process of their own.

    python -m harness.latency TARGET SHAPE NUM_CLIENTS NUM_ROUNDS      SHAPE is JSON

Prints a JSON object: `ttft_ms`, one a request, and `gaps_ms`, one a token but each
request's first. The first round warms up and is not in it.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from .load import HttpClient, Shape, make_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

_TOKEN = b'"delta":{"content":'


@dataclass(frozen=True)
class Latencies:
    """See the module's docstring."""

    ttft_ms: list[float]
    gaps_ms: list[float]


def measure_latencies(target: str, shape: Shape, *, num_clients: int, num_rounds: int) -> Latencies:
    """Of streams in another process. Raises RuntimeError if one fails or falls short."""
    command = [sys.executable, "-m", "harness.latency", target, json.dumps(asdict(shape))]
    command += [str(num_clients), str(num_rounds)]
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr[-1000:]}")
    return Latencies(**json.loads(done.stdout))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least so many do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


class TimedClient(HttpClient):
    """An HttpClient that notes the time of each token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.times: list[float] = []

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. An event may come in two pieces: it counts when it ends."""
        now = time.perf_counter()
        before = max(0, len(self._data) - len(_TOKEN) + 1)
        super().data_received(data)
        self.times += [now] * bytes(self._data[before:]).count(_TOKEN)


async def _main(target: str, shape: Shape, num_clients: int, num_rounds: int) -> None:
    loop = asyncio.get_running_loop()
    host, _, port = target.rpartition(":")
    source = random.Random(target)
    ttft_ms: list[float] = []
    gaps_ms: list[float] = []

    async def run(client: TimedClient, delay_s: float) -> None:
        for number in range(num_rounds + 1):
            # Streams that begin together would all wait for one another's prefill.
            await asyncio.sleep(delay_s)
            client.times.clear()
            start = time.perf_counter()
            num_tokens, _ = await client.stream(make_prompt(source, shape.prompt_len))
            if num_tokens != shape.num_tokens:
                raise RuntimeError(f"a stream brought {num_tokens} tokens")
            if number:
                ttft_ms.append(1000 * (client.times[0] - start))
                pairs = zip(client.times, client.times[1:], strict=False)
                gaps_ms.extend(1000 * (after - before) for before, after in pairs)

    clients = []
    for _ in range(num_clients):
        _, client = await loop.create_connection(lambda: TimedClient(shape), host, int(port))
        clients.append(client)
    await asyncio.gather(*(run(client, 0.01 * at) for at, client in enumerate(clients)))
    print(json.dumps({"ttft_ms": ttft_ms, "gaps_ms": gaps_ms}))


if __name__ == "__main__":
    uvloop.run(
        _main(sys.argv[1], Shape(**json.loads(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4]))
    )
