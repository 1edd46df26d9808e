"""What trace readers share: their interface, bounded lines, and checks that name the place.

It knows no format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from headrace.errors import StartupError
from services.replay.workload import Trace, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

#: What a source that names no file begins with.
SYNTHETIC = "synthetic:"
#: A line of a trace, in bytes: the longest holds a whole conversation.
MAX_LINE_LEN = 16 * 1024 * 1024
#: Requests of a trace, and hash ids of all of them together.
MAX_REQUESTS = 2_000_000
MAX_HASH_IDS = 50_000_000
#: Tokens of one prompt, and of one answer.
MAX_PROMPT_TOKENS = 10_000_000
MAX_OUTPUT_TOKENS = 1_000_000
#: Arrivals lie within this after the trace's start: ten years.
MAX_ARRIVAL_MS = 10 * 366 * 86_400_000

_SHOWN_LEN = 60


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What a user says of a trace."""

    #: A name in the table of formats; "": recognize it.
    format: str = ""
    #: Only the first requests; 0: all.
    limit: int = 0
    #: Tokens that a hash id stands for, where the format does not say; 0: as is usual for it.
    trace_block_size: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "trace_block_size"):
            if getattr(self, name) < 0:
                raise StartupError(
                    f"trace option {name} must be 0 or more, not {getattr(self, name)}"
                )


class TraceReader(Protocol):
    """Reads one format."""

    def recognizes(self, line: str) -> bool:
        """Whether a file that begins with `line`, or a source that is `line`, is of this format."""

    def read(self, source: str, options: TraceOptions) -> Trace:
        """The trace. Raises StartupError, naming file, line, field and value."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a trace one is, for errors."""

    source: str
    line: int = 0

    def refuse(self, text: str) -> NoReturn:
        """Raise StartupError for this place."""
        where = f"{self.source}:{self.line}" if self.line else self.source
        raise StartupError(f"{where}: {text}")

    def integer(self, record: dict[str, Any], field: str, *, least: int, most: int) -> int:
        """`record[field]`, an integer within the limits."""
        value = self.number(record, field, least=least, most=most)
        if isinstance(value, float) and not value.is_integer():
            self.refuse(f"{field} must be an integer, not {shown(value)}")
        return int(value)

    def number(
        self, record: dict[str, Any], field: str, *, least: float, most: float
    ) -> int | float:
        """`record[field]`, a number within the limits."""
        if field not in record:
            self.refuse(f"{field} is missing")
        value = record[field]
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(f"{field} must be a number, not {shown(value)}")
        # Not `< least`: that would let NaN pass.
        if not least <= value <= most:
            self.refuse(f"{field} must be from {least:,} to {most:,}, not {shown(value)}")
        return value


def shown(value: object) -> str:
    """`value` for an error's text, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_LEN else text[:_SHOWN_LEN] + "…"


def lines(path: Path) -> Iterator[tuple[Place, str]]:
    """The file's lines that are not blank, without their ends, and where each is.

    Raises StartupError for a file that can't be read, is no UTF-8, or has too long a line.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_LEN + 1):
                number += 1
                place = Place(str(path), number)
                if len(raw) > MAX_LINE_LEN:
                    place.refuse(f"a line may have {MAX_LINE_LEN:,} bytes, and this has more")
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    place.refuse(f"not UTF-8: byte {raw[error.start]:#04x} at {error.start}")
                if line:
                    yield place, line
    except OSError as error:
        raise StartupError(f"trace {path} can't be read: {error.strerror or error}") from error


def first_line(path: Path) -> str:
    """The file's first line that is not blank. Raises StartupError; an empty file is one."""
    for _, line in lines(path):
        return line
    raise StartupError(f"{path}: an empty file is no trace")


def records(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The JSON object of each line, and where it is. Raises StartupError."""
    for place, line in lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            place.refuse(f"not JSON ({error}): {shown(line)}")
        if not isinstance(record, dict):
            place.refuse(f"a JSON object is expected, not {shown(record)}")
        yield place, record


def collect(
    source: str, requests: Iterable[tuple[Place, TraceRequest]], *, block_size: int, limit: int
) -> Trace:
    """A trace of `requests`, by arrival. `limit` 0: all. Raises StartupError.

    Of requests that are not in the order of arrival, the limit takes the first in the file.
    """
    taken: list[TraceRequest] = []
    num_ids = 0
    for place, request in requests:
        if len(taken) >= MAX_REQUESTS:
            place.refuse(f"a trace may have {MAX_REQUESTS:,} requests; --limit takes the first")
        num_ids += len(request.hash_ids)
        if num_ids > MAX_HASH_IDS:
            place.refuse(f"a trace may have {MAX_HASH_IDS:,} hash ids; --limit takes the first")
        taken.append(request)
        if len(taken) == limit:
            break
    if not taken:
        raise StartupError(f"{source}: the trace has no requests")
    taken.sort(key=lambda request: request.arrival_ms)
    return Trace(tuple(taken), block_size)


def json_object(line: str) -> dict[str, Any]:
    """The JSON object that `line` is; {} if it is none: for recognizing formats."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
