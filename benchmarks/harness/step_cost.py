"""What one decode step costs, over batch and context; and how well a line fits it.

Plans are made by hand, so that no prompt needs computing: contents of the KV cache
change no cost. Sequences lie in a cache of 32,768 positions, more than a processor's
caches hold, at random places, so that they may share blocks.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.models.files import from_path
from headrace.models.store import resolve
from headrace.params import SamplingParams
from services.worker import model_config
from services.worker.engines.torch.attention import KVCache
from services.worker.engines.torch.device import place, use_threads
from services.worker.engines.torch.engine import load
from services.worker.engines.torch.runner import TorchRunner
from services.worker.plan import ScheduledSequence, StepPlan

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)
BLOCK_SIZE = 16
NUM_BLOCKS = 32_768 // BLOCK_SIZE

#: (batch, context) -> milliseconds, the least of several runs.
Costs = dict[tuple[int, int], float]


@dataclass(frozen=True)
class LinearCost:
    """step = base + per_sequence · batch + per_token · batch · context."""

    base_ms: float
    per_sequence_ms: float
    per_token_us: float
    r2: float


def measure_steps(model: str, dtype: str, threads: int, repeats: int) -> Costs:
    """The cost of greedy decode steps."""
    use_threads(threads)
    files = from_path(resolve(model).path, model)
    args = model_config.read(files)
    placement = place("cpu", dtype)
    cache = KVCache(args, NUM_BLOCKS, BLOCK_SIZE, placement)
    for layer in cache.layers:
        layer.zero_()
    runner = TorchRunner(load(files, args, placement, lambda *_: None), cache)
    costs = {}
    for context in CONTEXTS:
        for batch in BATCHES:
            times = []
            for seed in range(repeats):
                plan = _plan(batch, context, seed)
                started = time.perf_counter()
                runner.execute(plan)
                times.append(time.perf_counter() - started)
            costs[batch, context] = min(times) * 1000
    return costs


def _plan(batch: int, context: int, seed: int) -> StepPlan:
    numbers = random.Random(seed)
    params = SamplingParams(temperature=0.0)
    size = context // BLOCK_SIZE
    items = []
    for index in range(batch):
        first = numbers.randrange(NUM_BLOCKS - size + 1)
        table = list(range(first, first + size))
        items.append(ScheduledSequence(index, [5], context - 1, table, True, params))
    return StepPlan(items)


def fit(costs: Costs) -> LinearCost:
    """Least squares, each point weighed by its own size."""
    points = np.array([(1.0, b, b * c) for b, c in costs])
    values = np.array(list(costs.values()))
    found, *_ = np.linalg.lstsq(points / values[:, None], np.ones(len(values)), rcond=None)
    left = float(((values - points @ found) ** 2).sum())
    r2 = 1 - left / float(((values - values.mean()) ** 2).sum())
    return LinearCost(float(found[0]), float(found[1]), float(found[2]) * 1000, r2)


def plot(costs: Costs, path: str) -> None:
    """Lines over context and over batch, side by side, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for batch in BATCHES:
        left.plot(CONTEXTS, [costs[batch, c] for c in CONTEXTS], marker=".", label=f"batch {batch}")
    for context in CONTEXTS:
        label = f"context {context:,}"
        right.plot(BATCHES, [costs[b, context] for b in BATCHES], marker=".", label=label)
    left.set_xlabel("context, tokens")
    right.set_xlabel("batch, sequences")
    for axes in (left, right):
        axes.set_ylabel("decode step, ms")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
