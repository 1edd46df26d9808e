"""Our torch engine in this process, told what to do by lines on stdin.

    python -m harness.engine_side MODEL DTYPE      (in benchmarks/)

Each line is `{"prompts": [[id, …], …], "max_tokens": n}`: the prompts run twice, for
one token, then for all with the prompts cached. The answer holds both phases'
steps as [seconds, CPU seconds, tokens], and the tokens. A line
`{"logits": [[id, …], …]}` is answered with each sequence's best two logits' distance.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from typing import Any

from headrace.blocks import namespace_key
from headrace.models.files import from_path
from headrace.models.store import resolve
from headrace.params import SamplingParams
from services.worker import model_config
from services.worker.engine import EngineConfig, SequenceRequest
from services.worker.engines.torch.attention import KVCache, bytes_per_position
from services.worker.engines.torch.device import place
from services.worker.engines.torch.engine import TorchEngine, load
from services.worker.engines.torch.kernels import kernels
from services.worker.engines.torch.runner import TorchRunner
from services.worker.engines.torch.weights import open_checkpoint
from services.worker.plan import ScheduledSequence, StepPlan

KV_BLOCKS = 2 * 32 * (512 + 64) // 16


def start(model: str, dtype: str) -> TorchEngine:
    """An engine whose KV cache holds 32 sequences twice."""
    files = resolve(model)
    config = EngineConfig(
        str(files.path), files.name, dtype=dtype, num_blocks=KV_BLOCKS,
        deterministic=os.environ.get("DETERMINISTIC") == "1",
    )  # fmt: skip
    return TorchEngine(config, lambda *_: None)


def run(
    engine: TorchEngine, prompts: list[list[int]], max_tokens: int
) -> tuple[list[list[float]], list[list[int]]]:
    """Step until all is done: [seconds, CPU seconds, tokens] of each step; each one's tokens."""
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
    key = namespace_key("benchmark")
    engine.submit([SequenceRequest(i, prompt, [], params, key) for i, prompt in enumerate(prompts)])
    tokens: list[list[int]] = [[] for _ in prompts]
    steps = []
    while engine.has_work():
        wall, cpu = time.perf_counter(), time.process_time()
        output = engine.step()
        steps.append([time.perf_counter() - wall, time.process_time() - cpu,
                      len(output.token_ids)])  # fmt: skip
        for index, token in zip(output.sequence_ids, output.token_ids, strict=True):
            tokens[index].append(token)
    return steps, tokens


def distances(model: str, dtype: str, sequences: list[list[int]]) -> list[float]:
    """How far the likeliest next token's logit is above the second's."""
    files = from_path(resolve(model).path, model)
    args = model_config.read(files)
    placement = place("cpu", dtype)
    runner = TorchRunner(
        load(files, args, placement, lambda *_: None), KVCache(args, 64, 16, placement)
    )
    found = []
    for tokens in sequences:
        item = ScheduledSequence(0, tokens, 0, list(range(64)), True, SamplingParams())
        best = runner.logits(StepPlan([item]))[0].topk(2).values
        found.append(float(best[0] - best[1]))
    return found


def _budget_mib(model: str, dtype: str) -> int:
    """Weights, each kept once, and the KV cache."""
    files = from_path(resolve(model).path, model)
    placement = place("cpu", dtype)
    numbers = sum(map(math.prod, open_checkpoint(files).shapes.values()))
    kv = bytes_per_position(model_config.read(files), placement) * KV_BLOCKS * 16
    return (numbers * placement.weight_dtype.itemsize + kv) >> 20


def main() -> None:
    """Serve until stdin ends."""
    model, dtype = sys.argv[1:]
    started = time.perf_counter()
    engine = start(model, dtype)
    ready_s = time.perf_counter() - started
    run(engine, [[1, 2, 3]], 1)
    about = {
        "ready_s": ready_s,
        "first_token_s": time.perf_counter() - started,
        "budget_mib": _budget_mib(model, dtype),
        "settings": {"kernels": kernels() is not None, "resume": engine.info.resume},
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {}
        if "logits" in job:
            answer["distances"] = distances(model, dtype, job["logits"])
        else:
            answer["prefill"], _ = run(engine, job["prompts"], 1)
            answer["decode"], answer["tokens"] = run(engine, job["prompts"], job["max_tokens"])
        answer["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
