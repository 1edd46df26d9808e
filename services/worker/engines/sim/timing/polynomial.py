"""The polynomials of Dynamo's mocker, so that its replay and ours compare.

    prefill(n) = 4.209989e-7 n² + 1.518344e-2 n + 16.50142           ms, n tokens computed
    decode(p)  = max(1, -25.74 p² + 54.01 p + 5.74)                  ms, p at most 1

A step takes the sum of the two that it has work for. n counts the prompt tokens of
all chunks together; what was cached before them costs nothing. p is the share of the
KV cache's tokens that decoding sequences have, a shared block counted for each. The
formulas are those of ai-dynamo 1.6.1's mocker; `speedup` divides both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.worker.engines.sim.timing.base import StepWork
    from services.worker.engines.sim.timing.specs import Defaults, Options


@dataclass(frozen=True, slots=True)
class Polynomial:
    """See the module's docstring."""

    speedup: float = 1.0

    def milliseconds(self, work: StepWork) -> float:
        """See StepTiming."""
        total = 0.0
        if work.prefills:
            n = work.prefill_tokens
            total += (4.209989e-7 * n + 1.518344e-2) * n + 16.50142
        if work.num_decodes:
            p = min(1.0, work.decode_tokens / work.capacity_tokens)
            total += max(1.0, (-25.74 * p + 54.01) * p + 5.74)
        return total / self.speedup


def create(options: Options, defaults: Defaults) -> Polynomial:
    """From a spec's options."""
    return Polynomial(options.number("speedup", 1.0, least=1e-6))
