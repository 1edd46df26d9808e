"""What does sampling cost a step of the torch engine?

CPU time of one thread for 32 sequences, at two sizes of vocabulary, for logits
that fall with their rank as a small model's do (a nucleus of 0.95 has some 8
tokens at temperature 0.7, and some 220 at 1), and with 512 tokens behind each. It
has no peer: `ratios` is empty.

    python benchmarks/sampling.py [--quick]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from harness.report import Spread, last_line, table, versions

from headrace.params import SamplingParams
from services.worker.engines.torch.sampling import Sampler
from services.worker.plan import ScheduledSequence

NUM_ROWS = 32
NUM_TOKENS = 512
VOCAB_SIZES = (49_152, 151_936)
#: How fast logits fall with the logarithm of their rank, and what is added by chance.
FALL, NOISE = 1.5, 0.5

PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.95, temperature 0.7": {"temperature": 0.7, "top_p": 0.95},
    "top-p 0.95, temperature 1": {"top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "greedy, penalties": {"temperature": 0.0, **PENALTIES},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
    "everything": {
        "temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "logprobs": 5,
        "logit_bias": ((5, 1.0), (77, -3.0)), "min_tokens": 9, **PENALTIES,
        "bad_token_sequences": ((3,), (4, 5)),
    },
}  # fmt: skip


def make_logits(vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, vocab]: each row falls with the rank of its tokens, which stand in any order."""
    ranks = torch.rand(NUM_ROWS, vocab_size, generator=generator).argsort(-1)
    noise = torch.randn(NUM_ROWS, vocab_size, generator=generator)
    return (ranks + 1).log() * -FALL + noise * NOISE


def measure(logits: torch.Tensor, params: dict[str, Any], num_steps: int) -> Spread:
    """Microseconds of steps, the first one (which prepares its rows) left out."""
    sampler = Sampler()
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_ROWS, NUM_TOKENS)
    tokens = torch.randint(logits.shape[1], shape, generator=generator).tolist()
    samplings = [SamplingParams(seed=row, **params) for row in range(NUM_ROWS)]
    times = []
    for _ in range(num_steps + 1):
        items = [
            ScheduledSequence(
                row, tokens[row][-1:], len(tokens[row]) - 1, [], True, samplings[row],
                tokens=tokens[row], num_prompt_tokens=NUM_TOKENS, end_token_ids=frozenset({2}),
            )
            for row in range(NUM_ROWS)
        ]  # fmt: skip
        step_logits = logits.clone()
        started = time.process_time()
        with torch.inference_mode():
            result = sampler.sample(step_logits, items)
        times.append((time.process_time() - started) * 1e6)
        for row, token in enumerate(result.token_ids):
            tokens[row].append(token)
    return Spread.of(times[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three steps each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    figures: dict[str, object] = {}
    generator = torch.Generator().manual_seed(0)
    logits = [make_logits(size, generator) for size in VOCAB_SIZES]
    for name, params in CASES.items():
        found = [measure(each, params, 3 if args.quick else 20) for each in logits]
        rows.append([name, *map(str, found)])
        for size, spread in zip(VOCAB_SIZES, found, strict=True):
            figures[f"{name}, {size}"] = round(spread.median)
    print(f"{NUM_ROWS} sequences, CPU µs a step\n")
    print(table(["parameters", *(f"{size} tokens" for size in VOCAB_SIZES)], rows))
    print(last_line("sampling", ratios={}, figures=figures, versions=versions("torch", "numpy")))


if __name__ == "__main__":
    main()
