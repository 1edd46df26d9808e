"""Which fixed shape a decode step takes, and what is written into it: no tensors, no device.

Shapes are few, so that each can be captured once: rows are padded to a power of two
or to the most there are, block tables to a power of two from 64 on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.worker.plan import StepPlan

LEAST_WIDTH = 64


class Shape(NamedTuple):
    """Rows, and blocks of each row's table."""

    rows: int
    width: int


def is_decode(plan: StepPlan) -> bool:
    """Whether each row is sampled from and is its sequence's only one."""
    return all(
        len(item.token_ids) == 1 and item.sample and not item.scored for item in plan.scheduled
    )


def shape_of(num_rows: int, num_blocks: int, max_rows: int, max_width: int) -> Shape | None:
    """The smallest shape that holds these; None: there are more than the most."""
    if not 0 < num_rows <= max_rows or num_blocks > max_width:
        return None
    width = max(LEAST_WIDTH, _power(num_blocks))
    return Shape(min(_power(num_rows), max_rows), min(width, max_width))


def all_shapes(max_rows: int, max_width: int) -> Iterator[Shape]:
    """Every shape that `shape_of` gives, the largest first."""
    rows = {min(1 << bit, max_rows) for bit in range(max_rows.bit_length() + 1)}
    widths = {
        min(max(LEAST_WIDTH, 1 << bit), max_width) for bit in range(max_width.bit_length() + 1)
    }
    for count in sorted(rows, reverse=True):
        for width in sorted(widths, reverse=True):
            yield Shape(count, width)


def _power(count: int) -> int:
    """The least power of two that is `count` or more."""
    return 1 << (count - 1).bit_length()
