"""A step's time as a sum of constants: easy to reason about, nobody's hardware.

step_ms (if anything decodes) + step_ms_per_sequence · decodes + prefill_ms_per_token · tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.worker.engines.sim.timing.base import StepWork
    from services.worker.engines.sim.timing.specs import Defaults, Options


@dataclass(frozen=True, slots=True)
class Linear:
    """See the module's docstring. All in ms."""

    step_ms: float = 10.0
    step_ms_per_sequence: float = 0.0
    prefill_ms_per_token: float = 0.1

    def milliseconds(self, work: StepWork) -> float:
        """See StepTiming."""
        return (
            (self.step_ms if work.num_decodes else 0.0)
            + self.step_ms_per_sequence * work.num_decodes
            + self.prefill_ms_per_token * work.prefill_tokens
        )


def create(options: Options, defaults: Defaults) -> Linear:
    """From a spec's options."""
    names = ("step_ms", "step_ms_per_sequence", "prefill_ms_per_token")
    return Linear(*(options.number(name, getattr(defaults, name)) for name in names))
