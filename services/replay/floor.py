"""The floor: what no choice of workers can beat, given the reuse that there was.

Every request alone on an idle worker, with the tokens cached that it found cached.
It knows no queue, no neighbour and no network.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from services.worker.engines.sim.timing import StepWork, create

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from services.replay.simulation import SimulationConfig, SimulationResult
    from services.worker.engines.sim.timing import StepTiming


def floor_ttft_ms(result: SimulationResult) -> NDArray[np.float64]:
    """TTFT of each request alone, in the trace's order; NaN where there was no token."""
    config = result.config
    timing = create(config.timing)

    @lru_cache(maxsize=1 << 16)
    def alone(num_tokens: int, num_cached: int) -> float:
        return alone_ttft_ms(timing, config, num_tokens, num_cached)

    floor = np.full(len(result.ttft_ms), np.nan)
    for index in np.flatnonzero(~np.isnan(result.ttft_ms)):
        floor[index] = alone(int(result.prompt_tokens[index]), int(result.cached_tokens[index]))
    return floor


def alone_ttft_ms(
    timing: StepTiming, config: SimulationConfig, num_tokens: int, num_cached: int
) -> float:
    """Milliseconds to a prompt's first token on an idle worker: its prefill in chunks."""
    capacity = config.num_blocks * config.block_size
    total = 0.0
    # A prompt that is cached whole computes its last token.
    before = min(num_cached, num_tokens - 1)
    while before < num_tokens:
        chunk = min(config.max_step_tokens, num_tokens - before)
        total += timing.milliseconds(StepWork(0, 0, ((chunk, before),), capacity))
        before += chunk
    return total
