"""What is known of one request when it is over. Times are seconds of one monotonic clock."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True)
class Prompt:
    """What to ask: a text, and how many tokens to generate at most."""

    text: str
    max_tokens: int


@dataclass(slots=True)
class Sample:
    """One request. `meant_at` is when it should have started: what a late client or a full
    server makes it wait counts (no coordinated omission). `error` "" means success."""

    meant_at: float
    sent_at: float = 0.0
    ended_at: float = 0.0
    #: When each piece of output came.
    deltas: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    #: The kind of failure, for counting, and the words of it.
    error: str = ""
    detail: str = ""

    def fail(self, kind: str, detail: str = "") -> None:
        """Note the first failure."""
        if not self.error:
            self.error, self.detail = kind, detail[:500]

    @property
    def ttft_s(self) -> float:
        """From when it was meant to start to its first output."""
        return self.deltas[0] - self.meant_at

    @property
    def latency_s(self) -> float:
        """From when it was meant to start to its end."""
        return self.ended_at - self.meant_at

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None if there is no second."""
        if self.output_tokens < 2 or len(self.deltas) < 2:
            return None
        return (self.deltas[-1] - self.deltas[0]) / (self.output_tokens - 1)
