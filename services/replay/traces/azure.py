"""Azure's LLM inference traces: when requests came and how long they were, as CSV.

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:15:46.6805900,374,44

They tell nothing of what prompts share, so every prompt is all its own.

Source: github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset 2023 and 2024
(Patel et al., Splitwise, ISCA 2024; Stojkovic et al., DynamoLLM, HPCA 2025).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from services.replay.traces.base import (
    MAX_ARRIVAL_MS,
    MAX_OUTPUT_TOKENS,
    MAX_PROMPT_TOKENS,
    Place,
    TraceOptions,
    collect,
    lines,
    shown,
)
from services.replay.workload import Trace, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Azure:
    """See TraceReader."""

    def recognizes(self, line: str) -> bool:
        """See TraceReader.recognizes."""
        return set(COLUMNS) <= {name.strip() for name in line.split(",")}

    def read(self, source: str, options: TraceOptions) -> Trace:
        """See TraceReader.read."""
        return collect(source, _requests(Path(source)), block_size=0, limit=options.limit)


def _requests(path: Path) -> Iterator[tuple[Place, TraceRequest]]:
    columns: list[str] | None = None
    start: datetime | None = None
    for place, line in lines(path):
        cells = [cell.strip() for cell in line.split(",")]
        if columns is None:
            columns = cells
            for name in COLUMNS:
                if name not in columns:
                    place.refuse(f"the header must name {', '.join(COLUMNS)}, not {shown(line)}")
            continue
        if len(cells) != len(columns):
            place.refuse(f"{len(columns)} columns are expected, not {len(cells)}: {shown(line)}")
        row = dict(zip(columns, cells, strict=True))
        moment = _moment(place, row["TIMESTAMP"])
        start = start or moment
        arrival_ms = _since(place, start, moment)
        yield (
            place,
            TraceRequest(
                arrival_ms=arrival_ms,
                num_tokens=_tokens(place, row, "ContextTokens", MAX_PROMPT_TOKENS),
                output_tokens=_tokens(place, row, "GeneratedTokens", MAX_OUTPUT_TOKENS),
            ),
        )


def _since(place: Place, start: datetime, moment: datetime) -> float:
    """Milliseconds from the first row's moment on."""
    try:
        after = moment - start
    except TypeError:
        place.refuse("TIMESTAMP must have a time zone in all rows or in none")
    arrival_ms = after / timedelta(milliseconds=1)
    if not 0 <= arrival_ms <= MAX_ARRIVAL_MS:
        place.refuse(f"TIMESTAMP must not be before the first row's, {start}, not {moment}")
    return arrival_ms


def _moment(place: Place, text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        place.refuse(f"TIMESTAMP must be like 2023-11-16 18:15:46.6805900, not {shown(text)}")


def _tokens(place: Place, row: dict[str, str], field: str, most: int) -> int:
    text = row[field]
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:20]) <= most):
        place.refuse(f"{field} must be an integer from 1 to {most:,}, not {shown(text)}")
    return int(text)
