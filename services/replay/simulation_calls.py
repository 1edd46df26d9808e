"""What a simulation keeps of each request while it is under way, and of gaps between tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from services.replay.simulation_content import Content
from services.replay.simulation_routers import RouterNode
from services.replay.workload import TraceRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(slots=True, eq=False)
class Call:
    """One request. Times in seconds."""

    number: int
    request: TraceRequest
    content: Content
    arrived: float
    router: RouterNode | None = None
    worker: int = -1
    #: Tokens that reached the gateway.
    generated: int = 0
    first_at: float | None = None
    last_at: float = 0.0
    #: Of the first decision, and of the first engine that ended it.
    matched_tokens: int = 0
    predicted_ttft_ms: float = 0.0
    cached_tokens: int = 0
    num_migrations: int = 0
    num_retries: int = 0
    failed_on: frozenset[str] = field(default_factory=frozenset)


class Gaps:
    """How often which time lay between two tokens of a sequence, to the microsecond."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, gap_s: float, count: int) -> None:
        """`count` gaps of so many seconds."""
        gap = round(gap_s * 1e6)
        self._counts[gap] = self._counts.get(gap, 0) + count

    def add_steps(self, begin: float, ends: Sequence[float], count: int) -> None:
        """In steps that follow each other, `count` sequences got a token each."""
        counts = self._counts
        for end in ends:
            gap = round((end - begin) * 1e6)
            counts[gap] = counts.get(gap, 0) + count
            begin = end

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Gaps in ms, ascending, and their counts."""
        items = sorted(self._counts.items())
        gaps = np.array([gap for gap, _ in items], np.float64) / 1000
        return gaps, np.array([count for _, count in items], np.int64)
