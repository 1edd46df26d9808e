"""Recorded load: Mooncake's JSONL and Azure's CSV, as prompts and start times.

Mooncake (https://github.com/kvcache-ai/Mooncake): a line is an object with `timestamp`
in ms, `input_length` and `output_length` in tokens, and `hash_ids`, one for each 512
tokens of prompt; equal ids mean equal text, so a prefix cache finds what it found
then. Azure (https://github.com/Azure/AzurePublicDataset): a row has TIMESTAMP,
ContextTokens and GeneratedTokens, and nothing is shared.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from headrace.errors import StartupError

if TYPE_CHECKING:
    from pathlib import Path

BLOCK_LEN = 512
#: `words(key, count)`: text of about `count` tokens, the same for the same key.
Words = Callable[[str, int], str]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request: seconds after the trace's first, and its tokens."""

    at_s: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()

    def text(self, words: Words, number: int) -> str:
        """A prompt of its length that shares what it shared."""
        if not self.hash_ids:
            return words(f"request {number}", self.input_len)
        parts, left = [], self.input_len
        for hash_id in self.hash_ids:
            parts.append(words(f"block {hash_id}", min(BLOCK_LEN, left)))
            left -= BLOCK_LEN
            if left <= 0:
                break
        return " ".join(parts)


def read(path: Path, limit: int | None) -> list[Recorded]:
    """The first `limit` requests. Raises StartupError naming file, line and field."""
    try:
        with path.open(newline="") as file:
            rows = _azure(file) if path.suffix == ".csv" else _mooncake(file)
            found: list[Recorded] = []
            while limit is None or len(found) < limit:
                try:
                    recorded = next(rows, None)
                except (ValueError, KeyError, TypeError) as error:
                    raise StartupError(
                        f"{path}: record {len(found) + 1} is none of a Mooncake (.jsonl) or Azure "
                        f"(.csv) trace: {type(error).__name__}: {error}"
                    ) from error
                if recorded is None:
                    break
                found.append(recorded)
    except OSError as error:
        raise StartupError(f"--trace {path}: {error.strerror}") from error
    if not found:
        raise StartupError(f"--trace {path}: there is no request in it")
    found.sort(key=lambda recorded: recorded.at_s)
    return found


def _mooncake(lines: Iterator[str]) -> Iterator[Recorded]:
    first = None
    for line in lines:
        if not line.strip():
            continue
        record = json.loads(line)
        at_s = float(record["timestamp"]) / 1000
        first = at_s if first is None else first
        yield Recorded(
            at_s - first,
            max(1, int(record["input_length"])),
            max(1, int(record["output_length"])),
            tuple(map(int, record.get("hash_ids", ()))),
        )


def _azure(lines: Iterator[str]) -> Iterator[Recorded]:
    first = None
    for row in csv.DictReader(lines):
        # Seven digits of a second, of which Python reads six.
        moment = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
        first = moment if first is None else first
        yield Recorded(
            (moment - first).total_seconds(),
            max(1, int(row["ContextTokens"])),
            max(1, int(row["GeneratedTokens"])),
        )
