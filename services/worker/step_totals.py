"""What an engine's steps did and how long they took, since its start.

Routers learn from it what a worker's steps take (services/router/latency_model.py): a
step's time is a sum of costs of just these. It knows no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.plan import StepPlan


class Totals(TypedDict):
    """The totals under the names that EngineStats and WorkerLoad have for them."""

    step_ms: float
    prefill_steps: int
    prefill_tokens: int
    prefill_squares: int
    prefill_context: int
    decode_steps: int
    decode_sequences: int
    decode_context: int


class StepTotals:
    """Running sums over steps; see WorkerLoad in worker.proto for what they mean."""

    __slots__ = (
        "_decode_context", "_decode_sequences", "_decode_steps", "_prefill_context",
        "_prefill_squares", "_prefill_steps", "_prefill_tokens", "_step_ms",
    )  # fmt: skip

    def __init__(self) -> None:
        self._step_ms = 0.0
        self._prefill_steps = self._prefill_tokens = 0
        self._prefill_squares = self._prefill_context = 0
        self._decode_steps = self._decode_sequences = self._decode_context = 0

    def add(self, plan: StepPlan, num_decodes: int, elapsed_ms: float) -> None:
        """A step, the first `num_decodes` of whose sequences decode."""
        scheduled = plan.scheduled
        if num_decodes:
            context = 0
            for item in scheduled[:num_decodes]:
                context += item.start + 1
            self.add_decodes(num_decodes, context, elapsed_ms)
        else:
            self._step_ms += elapsed_ms
        if len(scheduled) > num_decodes:
            self._prefill_steps += 1
            for item in scheduled[num_decodes:]:
                count = len(item.token_ids)
                self._prefill_tokens += count
                self._prefill_squares += count * count
                self._prefill_context += count * item.start

    def add_decodes(self, num_sequences: int, num_context: int, elapsed_ms: float) -> None:
        """A step in which so many sequences decoded, reading so many tokens of KV."""
        self._step_ms += elapsed_ms
        self._decode_steps += 1
        self._decode_sequences += num_sequences
        self._decode_context += num_context

    def add_decode_steps(
        self, num_sequences: int, num_context: int, began: float, ends: Sequence[float]
    ) -> None:
        """`add_decodes` for each of steps that follow each other, in which the same
        sequences get a token each. Times are in seconds."""
        total = self._step_ms
        for end in ends:
            total += (end - began) * 1000
            began = end
        count = len(ends)
        self._step_ms = total
        self._decode_steps += count
        self._decode_sequences += count * num_sequences
        self._decode_context += count * num_context + num_sequences * (count * (count - 1) // 2)

    def as_dict(self) -> Totals:
        """The sums so far."""
        return {
            "step_ms": self._step_ms,
            "prefill_steps": self._prefill_steps,
            "prefill_tokens": self._prefill_tokens,
            "prefill_squares": self._prefill_squares,
            "prefill_context": self._prefill_context,
            "decode_steps": self._decode_steps,
            "decode_sequences": self._decode_sequences,
            "decode_context": self._decode_context,
        }
