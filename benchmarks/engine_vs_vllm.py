"""How fast is the torch engine beside vLLM's CPU build?

Both serve the same SmolLM2 weights in the same type, in a process each, on the same
cores: prompts of 512 random ids, all different, 64 greedy tokens out, 1, 8 and 32
sequences at a time. Prefill is the time until every sequence has one token; then
the same prompts come again, cached, and decode is the steps in which every sequence
gets a token. The two take turns within one run.

    python benchmarks/engine_vs_vllm.py [--quick] [--dtype bfloat16 float32]

vLLM is set up once under `.bench/vllm`, by pip.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.report import Spread, last_line, table, versions
from harness.vllm_cpu import export, install

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = "smollm2-135m"
VOCAB_SIZE = 49152
PROMPT_LEN = 512
NUM_TOKENS = 64
CONCURRENCY = (1, 8, 32)
#: Of which concurrency the prefill is that is compared.
PREFILL_AT = 8
#: Distance of the two best logits below which rounding may choose either: bfloat16
#: keeps 8 bits, so that logits around 16 are rounded to steps of 1/8 at the end alone.
NEAR_TIE = 0.5
ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"


class Side:
    """A process that measures one engine, job by job."""

    def __init__(self, name: str, command: Sequence[str | Path]) -> None:
        self.name = name
        # Our package sets how OpenMP waits; that is for our side alone.
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        log = BENCH / f"engine_vs_vllm.{name}.log"
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                cwd=ROOT / "benchmarks", env=environment,
            )  # fmt: skip
        self._log = log
        self.about = self._answer()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """One job's answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End it, politely first."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended, see {self._log}")
        found: dict[str, Any] = json.loads(line)
        return found


@dataclass
class Rates:
    """Tokens per second of one engine at one concurrency, run by run."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, answer: dict[str, Any], concurrency: int, num_tokens: int) -> None:
        """Count one run, once it is sure that it did the work."""
        tokens = answer["tokens"]
        assert [len(item) for item in tokens] == [num_tokens] * concurrency, "all tokens must come"
        assert sum(step[2] for step in answer["prefill"]) == concurrency
        # The first step computes the end of the prompts too.
        full = [step for step in answer["decode"] if step[2] == concurrency][1:]
        assert len(full) >= num_tokens - 4, "all sequences must run together"
        self.prefill.append(concurrency * PROMPT_LEN / sum(s[0] for s in answer["prefill"]))
        self.decode.append(sum(s[2] for s in full) / sum(s[0] for s in full))


@dataclass
class Outputs:
    """Greedy tokens of both, and where they part."""

    num_same: int = 0
    parted: list[list[int]] = field(default_factory=list)

    def compare(
        self, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
    ) -> None:
        """Note each prompt with what both said until they parted."""
        for prompt, a, b in zip(prompts, ours, theirs, strict=True):
            if a == b:
                self.num_same += 1
            else:
                at = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
                self.parted.append(prompt + a[:at])


def compare(args: argparse.Namespace, dtype: str, python: Path, report: Report) -> None:
    """Both engines with weights of one type."""
    num_tokens = 16 if args.quick else NUM_TOKENS
    levels = CONCURRENCY[:2] if args.quick else CONCURRENCY
    side = ROOT / "benchmarks" / "harness" / "vllm_side.py"
    weights = export(MODEL, BENCH / f"{MODEL}-bf16")
    ours = Side("ours", [sys.executable, "-m", "harness.engine_side", MODEL, dtype])
    # -P: the folder's own modules must not stand in for the standard library's.
    theirs = Side("vllm", [python, "-P", side, weights, dtype])
    rates = {(name, level): Rates() for name in ("ours", "vllm") for level in levels}
    outputs = Outputs()
    try:
        numbers = random.Random(0)
        rounds = 1 if args.quick else args.rounds
        # The first run warms both up.
        for level, measured in [(1, False), *((n, True) for n in levels for _ in range(rounds))]:
            prompts = [
                [numbers.randrange(VOCAB_SIZE) for _ in range(PROMPT_LEN)] for _ in range(level)
            ]
            job = {"prompts": prompts, "max_tokens": num_tokens}
            a, b = ours.ask(job), theirs.ask(job)
            if measured:
                rates["ours", level].add(a, level, num_tokens)
                rates["vllm", level].add(b, level, num_tokens)
                outputs.compare(prompts, a["tokens"], b["tokens"])
        ours.about["peak_mib"] = a["peak_mib"]
        distances = ours.ask({"logits": outputs.parted})
    finally:
        ours.stop()
        theirs.stop()
    report.add(dtype, rates, levels, outputs, distances, ours.about, theirs.about)


class Report:
    """The table, the ratios and the figures of all types."""

    def __init__(self) -> None:
        self.ratios: dict[str, float] = {}
        self.figures: dict[str, object] = {}
        self.versions: dict[str, str] = {}

    def add(
        self,
        dtype: str,
        rates: dict[tuple[str, int], Rates],
        levels: Sequence[int],
        outputs: Outputs,
        answer: dict[str, Any],
        ours: dict[str, Any],
        theirs: dict[str, Any],
    ) -> None:
        """Print one type's table; raise AssertionError if outputs differ without a near tie."""
        end = "" if dtype == "bfloat16" else f"_{dtype}"
        rows = []
        for level in levels:
            for what in ("prefill", "decode"):
                spreads = [
                    Spread.of(getattr(rates[name, level], what)) for name in ("ours", "vllm")
                ]
                ratio = spreads[0].median / spreads[1].median
                rows.append([f"{what}, {level}", *map(str, spreads), f"{ratio:.2f}"])
                for name, spread in zip(("", "vllm_"), spreads, strict=True):
                    self.figures[f"{name}{what}_tok_s_c{level}{end}"] = _figure(spread)
                if what == "decode":
                    self.ratios[f"decode_speed_vs_vllm_c{level}{end}"] = round(ratio, 3)
                elif level == PREFILL_AT:
                    self.ratios[f"prefill_speed_vs_vllm{end}"] = round(ratio, 3)
        print(f"\n{MODEL}, weights in {dtype}, {PROMPT_LEN}-token prompts, tokens/s\n")
        print(table(["what, sequences", "Headrace", "vLLM", "ratio"], rows))
        worst = max(answer["distances"], default=0.0)
        total = outputs.num_same + len(outputs.parted)
        print(f"\nsame greedy tokens: {outputs.num_same} of {total}; where the others part,")
        print(f"our two best logits are at most {worst:.3f} apart")
        print(f"ours: ready in {ours['ready_s']:.1f} s, peak {ours['peak_mib']} MiB "
            f"(weights and KV cache are {ours['budget_mib']}), "
              f"{ours['settings']}")  # fmt: skip
        print(f"vLLM: ready in {theirs['ready_s']:.1f} s, compiled, prefix caching on, "
              f"{theirs['threads']} threads, {theirs['settings']}")  # fmt: skip
        assert worst <= NEAR_TIE, "outputs differ where no rounding explains it"
        self.figures |= {
            f"first_token_s{end}": round(ours["first_token_s"], 2),
            f"peak_mib{end}": ours["peak_mib"],
            f"weights_and_kv_mib{end}": ours["budget_mib"],
            f"same_outputs{end}": [outputs.num_same, total],
            f"worst_tie{end}": round(worst, 3),
        }
        self.versions |= theirs["versions"]


def _figure(spread: Spread) -> list[float]:
    return [round(value, 1) for value in (spread.median, spread.low, spread.high)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 and 8 sequences, fewer tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=None, choices=("bfloat16", "float32"),
                        help="default: both; --quick: bfloat16")  # fmt: skip
    args = parser.parse_args()
    BENCH.mkdir(exist_ok=True)
    python = install(BENCH / "vllm")
    report = Report()
    for dtype in args.dtype or (["bfloat16"] if args.quick else ["bfloat16", "float32"]):
        compare(args, dtype, python, report)
    found = versions("torch") | report.versions
    print(last_line("engine_vs_vllm", ratios=report.ratios, figures=report.figures, versions=found))


if __name__ == "__main__":
    main()
