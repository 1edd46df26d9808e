"""One side of the tokenizer's benchmark: a fresh process that encodes text and says how fast.

    python benchmarks/harness/encoding.py SIDE FORMAT PATH KIND WARM_UP_MB MEASURE_MB

SIDE is "ours" or "theirs". Prints a JSON object: MB/s of CPU time for the text up to
WARM_UP_MB (`cold`), for the MEASURE_MB behind it (`warm`), and for as much behind that, as
one document (`whole`); a digest of all ids; seconds to load; MB that are the process's own at
the end. Like a pool process it is forked from one that has loaded and frozen the vocabulary.
"""

from __future__ import annotations

import os

# Before anything reads them: one thread.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import gc
import hashlib
import json
import re
import sys
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.texts import adversarial, documents
from headrace.models.files import Format, ModelFiles

if TYPE_CHECKING:
    from collections.abc import Callable


def ours(form: str, path: Path) -> Callable[[str], bytes]:
    """Our backend, as a pool process has it."""
    from services.tokenizer.backends import load_backend, read_spec

    return load_backend(read_spec(ModelFiles("benchmark", cast("Format", form), path))).encode


def theirs(form: str, path: Path) -> Callable[[str], bytes]:
    """Hugging Face's `tokenizers`, reading the same file."""
    from tokenizers import Tokenizer

    del form
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: cast("bytes", tokenizer.encode(text, add_special_tokens=False))


def main(side: str, form: str, path: str, kind: str, warm_up: float, measure: float) -> None:
    found = documents(kind) if kind != "adversarial" else adversarial(warm_up + 3 * measure)
    parts: tuple[list[str], ...] = ([], [], [])
    part, left = 0, warm_up
    for document in found:
        if left <= 0:
            part, left = part + 1, measure
            if part == len(parts):
                break
        parts[part].append(document)
        left -= len(document.encode()) / 1e6
    before = time.process_time()
    encode = (ours if side == "ours" else theirs)(form, Path(path))
    load_s = time.process_time() - before
    gc.collect()
    gc.freeze()
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    state = hashlib.sha256()

    def speed(some: list[str]) -> float:
        cpu_s = 0.0
        for document in some:
            before = time.process_time()
            ids = encode(document)
            cpu_s += time.process_time() - before
            # Theirs are objects until one asks for the ids, which is not counted.
            state.update(ids if isinstance(ids, bytes) else array("I", ids.ids).tobytes())
        return sum(len(document.encode()) for document in some) / 1e6 / cpu_s

    result = {"cold": speed(parts[0]), "warm": speed(parts[1]), "whole": speed(["".join(parts[2])])}
    memory = Path("/proc/self/smaps_rollup").read_text()
    private = sum(int(kb) for kb in re.findall(r"Private_\w+: *(\d+) kB", memory))
    rest = {"load_s": load_s, "digest": state.hexdigest(), "private_mb": private / 1024}
    print(json.dumps(result | rest))


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(float, sys.argv[5:7]))
