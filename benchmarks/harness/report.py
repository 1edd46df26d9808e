"""How benchmarks say what they found: a table for people, one line of JSON for programs."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Spread:
    """A figure measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}–{self.high:.1f})"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns, the first to the left and the rest to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def versions(*distributions: str) -> dict[str, str]:
    """Of Python, the kernel and `distributions`."""
    found = {name: metadata.version(name) for name in distributions}
    return {"python": platform.python_version(), "linux": platform.release(), **found}


def last_line(
    benchmark: str,
    *,
    ratios: Mapping[str, float],
    figures: Mapping[str, object],
    versions: Mapping[str, str],
) -> str:
    """The line that programs read."""
    return json.dumps(
        {"benchmark": benchmark, "ratios": ratios, "figures": figures, "versions": versions}
    )
