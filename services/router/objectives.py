"""What the operator wants of each model: its latency objectives, as the settings say them.

    --slo-ttft-ms 500 --slo-ttft-ms big-model=2000

A number alone is for every model, `MODEL=MS` for that one. Knows no policy and no worker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.errors import StartupError


class Objective(NamedTuple):
    """For one model, in ms; 0: nothing said."""

    ttft_ms: float = 0.0
    itl_ms: float = 0.0


_NOTHING = Objective()


@dataclass(frozen=True, slots=True)
class Objectives:
    """By model, and for all that are not named."""

    default: Objective = _NOTHING
    by_model: Mapping[str, Objective] = field(default_factory=dict)

    def of(self, model: str) -> Objective:
        """What is wanted of the model."""
        return self.by_model.get(model, self.default)

    @classmethod
    def parse(cls, ttft: Sequence[str], itl: Sequence[str]) -> Objectives:
        """From settings, each `MS` or `MODEL=MS`. Raises StartupError naming the setting."""
        ttfts = _by_model(ttft, "--slo-ttft-ms")
        itls = _by_model(itl, "--slo-itl-ms")
        default = Objective(ttfts.get("", 0.0), itls.get("", 0.0))
        named = {name for name in (*ttfts, *itls) if name}
        return cls(
            default,
            {
                name: Objective(ttfts.get(name, default.ttft_ms), itls.get(name, default.itl_ms))
                for name in named
            },
        )


def _by_model(entries: Sequence[str], what: str) -> dict[str, float]:
    parsed: dict[str, float] = {}
    for entry in entries:
        # A model's name may hold an equals sign; a number doesn't.
        model, _, said = entry.rpartition("=")
        try:
            ms = float(said)
        except ValueError:
            ms = math.nan
        if not 0 < ms < math.inf:
            raise StartupError(f"{what} must be MS or MODEL=MS with MS above 0, not {entry!r}")
        if model in parsed:
            whom = f"model {model!r}" if model else "all models"
            raise StartupError(f"{what} is given twice for {whom}")
        parsed[model] = ms
    return parsed
