"""Mooncake's JSON lines: arrival, lengths, and an id for each piece of the prompt.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, …]}

`timestamp` is in ms; equal ids are equal pieces with equal pieces before them. A
piece has 512 tokens (the last one may have fewer); traces that others made in this
form may have another size, which `trace_block_size` says. `session_id`, `priority`
and `timeout_ms` are read where a line has them.

Source: github.com/kvcache-ai/Mooncake, FAST25-release (Qin et al., FAST 2025).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.replay.traces.base import (
    MAX_ARRIVAL_MS,
    MAX_OUTPUT_TOKENS,
    MAX_PROMPT_TOKENS,
    Place,
    TraceOptions,
    collect,
    json_object,
    records,
    shown,
)
from services.replay.workload import Trace, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_SIZE = 512
_MAX_ID = (1 << 63) - 1


class Mooncake:
    """See TraceReader."""

    def recognizes(self, line: str) -> bool:
        """See TraceReader.recognizes."""
        return "input_length" in json_object(line)

    def read(self, source: str, options: TraceOptions) -> Trace:
        """See TraceReader.read."""
        block_size = options.trace_block_size or BLOCK_SIZE
        requests = _requests(Path(source), block_size)
        return collect(source, requests, block_size=block_size, limit=options.limit)


def _requests(path: Path, block_size: int) -> Iterator[tuple[Place, TraceRequest]]:
    for place, record in records(path):
        num_tokens = place.integer(record, "input_length", least=1, most=MAX_PROMPT_TOKENS)
        request = TraceRequest(
            arrival_ms=float(place.number(record, "timestamp", least=0, most=MAX_ARRIVAL_MS)),
            num_tokens=num_tokens,
            output_tokens=place.integer(record, "output_length", least=1, most=MAX_OUTPUT_TOKENS),
            hash_ids=_hash_ids(place, record, -(-num_tokens // block_size), block_size),
            session_id=_session_id(place, record),
            priority=_optional(place, record, "priority", least=-100, most=100),
            timeout_ms=_optional(place, record, "timeout_ms", least=0, most=MAX_ARRIVAL_MS),
        )
        yield place, request


def _hash_ids(
    place: Place, record: dict[str, Any], num_pieces: int, block_size: int
) -> tuple[int, ...]:
    ids = record.get("hash_ids", [])
    if not isinstance(ids, list):
        place.refuse(f"hash_ids must be a list of integers, not {shown(ids)}")
    for position, value in enumerate(ids):
        if type(value) is not int or not 0 <= value <= _MAX_ID:
            place.refuse(
                f"hash_ids[{position}] must be an integer from 0 to 2^63 - 1, not {shown(value)}"
            )
    if len(ids) > num_pieces:
        place.refuse(
            f"hash_ids has {len(ids)} ids, and an input_length of {record['input_length']} is "
            f"{num_pieces} pieces of {block_size} tokens; --trace-block-size says another size"
        )
    return tuple(ids)


def _session_id(place: Place, record: dict[str, Any]) -> str:
    value = record.get("session_id", "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        place.refuse(f"session_id must be a string or an integer, not {shown(value)}")
    return str(value)


def _optional(place: Place, record: dict[str, Any], field: str, *, least: int, most: int) -> int:
    return place.integer(record, field, least=least, most=most) if field in record else 0
