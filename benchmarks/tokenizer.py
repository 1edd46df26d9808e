"""How fast do we encode, beside Hugging Face's `tokenizers`?

Same files, same text, one fresh process each, one thread; ours and theirs alternate, and
all ids must agree. Speed is text over CPU time:

    cold         the first 4 MB of a process's life
    warm         the next MB of the same kind, no line of which it has seen
    whole        one more MB, as one document
    adversarial  words that never come twice

It also measures loading a vocabulary, and the memory that a pool process has to itself
after heavy use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.huggingface import write_tokenizer
from harness.report import Spread, last_line, table, versions
from harness.texts import KINDS

from headrace.models.store import resolve

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.vocabularies import folder  # noqa: E402 - the tests' data are the benchmark's too

DEFAULT = "smollm2-135m"
VOCABULARIES = (DEFAULT, "qwen3", "llama3", "gpt4o")
WORDPIECE = "minilm"
FOLDER = ROOT / ".bench" / "tokenizer"


def tokenizer_json(vocabulary: str) -> tuple[str, Path, Path]:
    """Format and path of our files, and the directory of their tokenizer.json."""
    if vocabulary != DEFAULT:
        return "huggingface", folder(vocabulary), folder(vocabulary)
    files = resolve(DEFAULT)
    return files.format, files.path, write_tokenizer(FOLDER / DEFAULT)


def encode(side: str, form: str, path: Path, kind: str, lengths: list[float]) -> dict[str, Any]:
    """One side's process. See harness/encoding.py."""
    command = [sys.executable, str(Path(__file__).with_name("harness") / "encoding.py")]
    command += [side, form, str(path), kind, *map(str, lengths)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(
    vocabulary: str, kind: str, lengths: list[float], repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Both sides in turn, `repeats` times. Raises RuntimeError if their ids differ."""
    form, path, json_path = tokenizer_json(vocabulary)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        runs["ours"].append(encode("ours", form, path, kind, lengths))
        runs["theirs"].append(encode("theirs", form, json_path, kind, lengths))
        if runs["ours"][-1]["digest"] != runs["theirs"][-1]["digest"]:
            raise RuntimeError(f"{vocabulary}, {kind}: the ids differ")
        print(".", end="", file=sys.stderr, flush=True)
    return runs


def speed_ratio(runs: dict[str, list[dict[str, Any]]], state: str) -> float:
    """Ours / theirs, of neighbours in time; the median."""
    pairs = zip(runs["ours"], runs["theirs"], strict=True)
    return statistics.median(ours[state] / theirs[state] for ours, theirs in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="under 60 s once the texts are there: the default vocabulary, one run, 1 MB cold",
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument(
        "--vocabulary",
        action="append",
        choices=VOCABULARIES,
        help=f"only this one, or these (default: all); ratios are the first one's ({DEFAULT})",
    )
    parser.add_argument(
        "--kind",
        action="append",
        choices=[*KINDS, "adversarial", "wordpiece"],
        help="only this kind of text, or these",
    )
    given = parser.parse_args()
    lengths, repeats = ([1.0, 0.4], 1) if given.quick else ([4.0, 1.0], given.repeats)
    wanted = given.vocabulary or ([DEFAULT] if given.quick else list(VOCABULARIES))
    subjects = [(v, kind) for v in wanted for kind in (*KINDS, "adversarial")]
    subjects.append((WORDPIECE, "english"))
    found = {
        (vocabulary, kind): compare(vocabulary, kind, lengths, repeats)
        for vocabulary, kind in subjects
        if given.kind is None or ("wordpiece" if vocabulary == WORDPIECE else kind) in given.kind
    }
    print(file=sys.stderr)
    report(found, wanted[0], lengths, repeats)


def report(
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]],
    default: str,
    lengths: list[float],
    repeats: int,
) -> None:
    """The table and the last line."""
    print(
        f"MB of text per second of CPU, median (low–high) of {repeats} fresh processes a side, one "
        f"thread.\nCold: the first {lengths[0]:g} MB; warm: {lengths[1]:g} MB behind them, not "
        "seen before; whole: as much again, as one document. All ids agree.\n"
    )
    rows, figures, ratios = [], {}, {}
    for (vocabulary, kind), runs in found.items():
        if vocabulary == default and kind == "adversarial":
            ratios["encode_speed_vs_hf_adversarial"] = round(speed_ratio(runs, "cold"), 3)
        for state in ("cold", "warm", "whole"):
            spreads = {side: Spread.of([run[state] for run in runs[side]]) for side in runs}
            ratio = speed_ratio(runs, state)
            rows.append([f"{vocabulary} {kind} {state}", *spreads.values(), f"{ratio:.2f}"])
            for side, spread in spreads.items():
                figures[f"{vocabulary}_{kind}_{state}_{side}_mb_s"] = _rounded(spread)
            name = "wordpiece" if vocabulary == WORDPIECE else kind
            if vocabulary in (default, WORDPIECE) and state != "whole" and kind != "adversarial":
                ratios[f"encode_speed_vs_hf_{name}_{state}"] = round(ratio, 3)
    print(table(["vocabulary, text, state", "Headrace", "tokenizers", "ratio"], rows))
    rows = []
    for vocabulary in dict.fromkeys(vocabulary for vocabulary, _ in found):
        cells: list[object] = [vocabulary]
        for figure in ("load_s", "private_mb"):
            for side in ("ours", "theirs"):
                runs_of = [runs[side] for (v, _), runs in found.items() if v == vocabulary]
                spread = Spread.of([run[figure] for runs in runs_of for run in runs])
                cells.append(f"{spread.median:.2f} ({spread.high:.2f})")
                figures[f"{vocabulary}_{figure}_{side}"] = _rounded(spread)
        rows.append(cells)
    header = ["vocabulary", "load s", "theirs", "own MB", "theirs"]
    print(
        "\nMedian (highest) of all runs: CPU seconds to load; MB that are a forked process's own "
        f"at its end.\n\n{table(header, rows)}\n"
    )
    used = versions("regex", "tokenizers")
    print(last_line("tokenizer", ratios=ratios, figures=figures, versions=used))


def _rounded(spread: Spread) -> list[float]:
    return [round(value, 3) for value in (spread.median, spread.low, spread.high)]


if __name__ == "__main__":
    main()
