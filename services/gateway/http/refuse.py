"""Refusals of single values, in a client's words. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.errors import InvalidArgument
from services.gateway.http.decode import cut

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import msgspec

UINT32 = (1 << 32) - 1


def refuse_not_yet(
    body: msgspec.Struct, not_yet: Mapping[str, tuple[object, ...]], path: str = ""
) -> None:
    """Raises InvalidArgument for a field that asks for more than happens anyway."""
    for name, harmless in not_yet.items():
        value = getattr(body, name)
        if value is not None and value not in harmless:
            raise InvalidArgument(
                f"{path}{name} is not supported yet: leave it out", field=f"{path}{name}"
            )


def within(field: str, value: int, low: int, high: int) -> None:
    """Raises InvalidArgument unless `low` <= `value` <= `high`."""
    if not low <= value <= high:
        raise InvalidArgument(
            f"{field} must be in [{low}, {high}], not {_quote_int(value)}", field=field
        )


def within_uint32(field: str, ids: Sequence[int]) -> None:
    """Raises InvalidArgument naming the first of `ids` that is no token id."""
    if ids and (min(ids) < 0 or max(ids) > UINT32):
        index, value = next((i, v) for i, v in enumerate(ids) if not 0 <= v <= UINT32)
        within(f"{field}[{index}]", value, 0, UINT32)


def quote(value: str) -> str:
    """`value` as far as it may be repeated, in quotes."""
    return f"'{cut(value)}'"


def _quote_int(value: int) -> str:
    # Python refuses to print integers of thousands of digits.
    return str(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
