"""Where a gateway's time goes, by py-spy's samples of a process that serves a load."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_SAMPLES_PER_S = 400
#: Where a token's way through the gateway begins.
_TOKEN_PATH = re.compile(r"(^|\.)(_deliver|on_tokens|on_delta) \(")
#: Where asyncio's primitives live, and what of ours would touch them.
_PRIMITIVE = re.compile(r"asyncio/|(^|\.)(_wake|_set|create_task|create_future|call_soon) \(")


def profile(pid: int, load: Callable[[], object], folder: Path, *, seconds: int) -> None:
    """Sample `pid` while `load` runs, for `seconds`; print what was seen."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gateway.collapsed"
    worker = threading.Thread(target=load)
    worker.start()
    subprocess.run(
        [
            *(str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(pid)),
            *("--rate", str(_SAMPLES_PER_S), "--duration", str(seconds), "--format", "raw"),
            *("--function", "--full-filenames", "--output", str(file)),
        ],
        check=True,
        capture_output=True,
    )
    worker.join()
    _print(_read(file), file)


def _read(file: Path) -> list[tuple[tuple[str, ...], int]]:
    stacks = []
    for line in file.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        stacks.append((tuple(stack.split(";")), int(count)))
    return stacks


def _print(stacks: list[tuple[tuple[str, ...], int]], file: Path) -> None:
    total = sum(count for _, count in stacks)
    own: Counter[str] = Counter()
    token_path: Counter[str] = Counter()
    touched: Counter[str] = Counter()
    num_token = 0
    for stack, count in stacks:
        own[_short(stack[-1])] += count
        start = next((i for i, frame in enumerate(stack) if _TOKEN_PATH.search(frame)), None)
        if start is None:
            continue
        num_token += count
        way = " > ".join(_short(frame) for frame in stack[start:])
        token_path[way] += count
        if any(_PRIMITIVE.search(frame) for frame in stack[start:]):
            touched[way] += count
    print(f"{total} samples of the gateway ({file}); functions by their own time:")
    for name, count in own.most_common(25):
        print(f"  {100 * count / total:5.1f} %  {name}")
    print(f"\nThe way of a token, {100 * num_token / total:.1f} % of the samples:")
    for name, count in token_path.most_common(15):
        print(f"  {100 * count / total:5.1f} %  {name}")
    print(f"\nSamples of asyncio's primitives on that way: {sum(touched.values())} of {num_token}")
    for name, count in touched.most_common():
        print(f"  {count:6d}  {name}")


def _short(frame: str) -> str:
    name, _, place = frame.partition(" (")
    parts = Path(place.rstrip(")")).parts[-2:]
    return f"{name} ({'/'.join(parts)})"
