"""Sampling parameters, validated: one type from the edge to the engine.

It knows what values mean and which are allowed, not which engine supports them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.errors import InvalidArgument

MAX_TEMPERATURE = 2.0
MAX_SEQUENCES = 16
MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token.

    `seed` keys the noise: the token at a position is a function of the logits,
    the seed and the position, whatever else is in the batch. `max_tokens` None
    means all that the context leaves.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def validate(self) -> SamplingParams:
        """Return itself. Raises InvalidArgument naming the field, the limit and the value."""
        _within("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _within("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        if self.top_k < 0:
            raise InvalidArgument(f"top_k must be 0 or more, not {self.top_k}", field="top_k")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidArgument(
                f"max_tokens must be 1 or more, not {self.max_tokens}", field="max_tokens"
            )
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise InvalidArgument(f"seed must fit 64 bits, not {self.seed}", field="seed")
        return self


def _within(field: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    below = value <= low if low_open else value < low
    if below or value > high or math.isnan(value):
        bracket = "(" if low_open else "["
        raise InvalidArgument(
            f"{field} must be in {bracket}{low:g}, {high:g}], not {value:g}", field=field
        )
