"""What attention needs to know of a plan: which rows are whose, and where their KV lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.worker.plan import StepPlan


class Span(NamedTuple):
    """Rows `first` to `first + num_rows` of a step: tokens of one sequence.

    They stand at positions `start` to `end = start + num_rows` of it.
    """

    first: int
    num_rows: int
    start: int
    end: int
    #: Physical blocks of positions below `end`, no more. Of positions that no layer
    #: with this table sees any longer it may be any block.
    blocks: list[int]


def spans_of(plan: StepPlan, block_size: int, group: int = 0) -> list[Span]:
    """The spans of a plan, in order, with the tables of one KV group."""
    spans, first = [], 0
    for item in plan.scheduled:
        num_rows = len(item.token_ids)
        num_blocks = -(-item.end // block_size)
        gone, blocks = (
            item.more_tables[group - 1] if group else (item.first_block, item.block_table)
        )
        table = [0] * gone + blocks[: num_blocks - gone]
        spans.append(Span(first, num_rows, item.start, item.end, table))
        first += num_rows
    return spans


def slots_of(spans: Iterable[Span], block_size: int) -> list[int]:
    """The cache slot of each row: block · block_size + place within."""
    return [
        span.blocks[position // block_size] * block_size + position % block_size
        for span in spans
        for position in range(span.start, span.end)
    ]
