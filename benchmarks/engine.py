"""How fast is the torch engine alone?

Loading, prefill and decode of the engine in this process, with no service around it:
512-token prompts of random ids, 64 tokens out, 1, 8 and 32 sequences at a time. It
has no peer: `ratios` is empty, and comparisons are other scripts' questions.

    python benchmarks/engine.py [--quick] [--model NAME] [--dtype auto] [--threads 2]
    python benchmarks/engine.py --plot FILE.png      what a decode step costs, see step_cost.py
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass

from harness.report import Spread, last_line, table, versions
from harness.step_cost import fit, measure_steps, plot

from headrace.blocks import namespace_key
from headrace.models.store import resolve
from headrace.params import SamplingParams
from services.worker.engine import EngineConfig, SequenceRequest
from services.worker.engines.torch.engine import TorchEngine

PROMPT_LEN = 512
NUM_TOKENS = 64
CONCURRENCY = (1, 8, 32)


@dataclass(frozen=True)
class Run:
    """Tokens per second of one batch, prefill and decode apart."""

    prefill: float
    decode: float


def measure(engine: TorchEngine, concurrency: int, num_tokens: int, seed: int) -> Run:
    """One batch, twice: for its first tokens, then with the prompts cached.

    Prefill is the first time, one token a sequence; decode is the second time's
    steps in which every sequence gets a token and no prompt is computed.
    """
    random_ids = random.Random(seed)
    prompts = [
        [random_ids.randrange(engine.info.vocab_size) for _ in range(PROMPT_LEN)]
        for _ in range(concurrency)
    ]
    started = time.perf_counter()
    submit(engine, prompts, num_tokens=1)
    while engine.has_work():
        engine.step()
    prefill_s = time.perf_counter() - started

    submit(engine, prompts, num_tokens)
    decoded, decode_s = 0, 0.0
    while engine.has_work():
        is_decode = not engine.stats().queued_prefill_tokens
        started = time.perf_counter()
        output = engine.step()
        if is_decode and len(output.token_ids) == concurrency:
            decoded += concurrency
            decode_s += time.perf_counter() - started
    assert decoded >= concurrency * (num_tokens - 2), "all sequences must run together"
    return Run(concurrency * PROMPT_LEN / prefill_s, decoded / decode_s)


def submit(engine: TorchEngine, prompts: list[list[int]], num_tokens: int) -> None:
    """Queue greedy sequences of exactly `num_tokens`."""
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=num_tokens, ignore_eos=True)
    key = namespace_key("benchmark")
    engine.submit([SequenceRequest(i, prompt, [], params, key) for i, prompt in enumerate(prompts)])


def start(args: argparse.Namespace) -> TorchEngine:
    """The engine, with a KV cache that all sequences of a batch fit twice."""
    files = resolve(args.model)
    config = EngineConfig(
        str(files.path),
        files.name,
        dtype=args.dtype,
        num_threads=args.threads,
        num_blocks=2 * max(CONCURRENCY) * (PROMPT_LEN + NUM_TOKENS) // 16,
    )
    return TorchEngine(config, lambda *_: None)


def _figure(spread: Spread) -> list[float]:
    return [round(value, 1) for value in (spread.median, spread.low, spread.high)]


def _step_cost(args: argparse.Namespace) -> None:
    costs = measure_steps(args.model, args.dtype, args.threads, repeats=2 if args.quick else 5)
    plot(costs, args.plot)
    model = fit(costs)
    contexts = sorted({context for _, context in costs})
    batches = sorted({batch for batch, _ in costs})
    rows = [[str(b), *(f"{costs[b, c]:.1f}" for c in contexts)] for b in batches]
    print(f"{args.model}, dtype {args.dtype}: ms of a decode step, by batch and context\n")
    print(table(["batch", *map(str, contexts)], rows))
    print(
        f"\nstep = {model.base_ms:.1f} ms + {model.per_sequence_ms:.2f} ms · batch + "
        f"{model.per_token_us:.3f} µs · batch · context, r² = {model.r2:.4f}"
    )
    print(f"plotted to {args.plot}")
    figures = {
        "step_base_ms": round(model.base_ms, 2),
        "step_per_sequence_ms": round(model.per_sequence_ms, 3),
        "step_per_cached_token_us": round(model.per_token_us, 4),
        "linear_r2": round(model.r2, 4),
    }
    print(last_line("engine", ratios={}, figures=figures, versions=versions("torch", "numpy")))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run each, fewer tokens out")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--plot", metavar="FILE", help="a decode step's cost by batch and context")
    args = parser.parse_args()
    if args.plot:
        _step_cost(args)
        return

    started = time.perf_counter()
    engine = start(args)
    load_s = time.perf_counter() - started
    measure(engine, 1, 4, seed=0)

    rows: list[list[str]] = []
    figures: dict[str, object] = {"load_s": round(load_s, 2)}
    for concurrency in CONCURRENCY:
        runs = [
            measure(engine, concurrency, 16 if args.quick else NUM_TOKENS, seed)
            for seed in range(concurrency, concurrency + (1 if args.quick else 3))
        ]
        prefill = Spread.of([run.prefill for run in runs])
        decode = Spread.of([run.decode for run in runs])
        rows.append([str(concurrency), str(prefill), str(decode)])
        figures[f"prefill_tok_s_c{concurrency}"] = _figure(prefill)
        figures[f"decode_tok_s_c{concurrency}"] = _figure(decode)
    print(f"{args.model}, dtype {args.dtype}, loaded in {load_s:.2f} s\n")
    print(table(["sequences", "prefill tok/s", "decode tok/s"], rows))
    found = versions("torch", "numpy")
    print(last_line("engine", ratios={}, figures=figures, versions=found))


if __name__ == "__main__":
    main()
