"""One sequence on its way to a worker and back: what is sent, and who is called.

The border between the pipeline and the workers' streams. No wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from headrace.errors import HeadraceError
from headrace.params import SamplingParams

Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Submission:
    """A sequence for a worker; it resumes if `generated_ids` is not empty.

    Ids are u32 little-endian. `sampling.seed` and `.max_tokens` are set;
    `max_tokens` counts `generated_ids`.
    """

    request_id: str
    index: int
    prompt_ids: bytes
    generated_ids: bytes
    sampling: SamplingParams
    namespace_key: bytes
    timeout_s: float
    traceparent: str = ""
    tenant: str = ""
    priority: int = 0
    hand_off: bytes = b""


@dataclass(frozen=True, slots=True)
class End:
    """The last that a worker says of a sequence."""

    reason: Reason
    cached_tokens: int
    #: Set when the reason is "error".
    error: HeadraceError | None = None


class Listener(Protocol):
    """Who hears of one sequence. Called from the reader of the worker's frames, many in
    one loop turn: a method must neither block nor await. After `on_end` or `on_lost`
    nothing more comes."""

    def on_tokens(self, token_ids: list[int]) -> None:
        """The sequence grew by these, in order."""

    def on_logprobs(self, tokens: bytes, prompt: bytes) -> None:
        """Packed log probabilities (see headrace.logprobs) of the tokens that come next,
        and of the next tokens of the prompt. Only if asked for."""

    def on_end(self, end: End) -> None:
        """The worker is done with it."""

    def on_lost(self, reason: str, *, died: bool) -> None:
        """The worker can't be reached any more; `died`: of this sequence, perhaps."""
