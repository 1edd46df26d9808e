"""One sequence for one call: the outlet behind `GenerateSequence`.

What comes while the caller is slow gathers, bounded, for its next message. It
knows no transport.
"""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING, NamedTuple

from headrace.errors import ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.worker.admission import Submission
    from services.worker.dispatch import End, Sequences

#: Tokens that may wait for the caller, and bytes of log probabilities.
MAX_WAITING_TOKENS = 1 << 16
MAX_WAITING_SCORES_LEN = 4 << 20


class Output(NamedTuple):
    """What came since the last one. Scores are packed, see headrace.logprobs."""

    tokens: array[int]
    scores: bytes
    prompt_scores: bytes
    end: End | None


class SingleSequence:
    """An Outlet of one sequence. `outputs` is to be closed, which stops the sequence."""

    def __init__(self, sequences: Sequences, submission: Submission) -> None:
        self.slots = array("I")
        self.tokens = array("I")
        self._scores = bytearray()
        self._prompt_scores = bytearray()
        self._sequences = sequences
        self._submission = submission
        self._sequence_id = 0
        self._end: End | None = None
        self._woken = asyncio.Event()

    def score(self, slot: int, data: bytes, *, prompt: bool) -> None:
        """See Outlet."""
        scores = self._prompt_scores if prompt else self._scores
        scores += data

    def end(self, end: End) -> None:
        """See Outlet."""
        self._end = end

    def flush(self) -> None:
        """See Outlet."""
        scores_len = len(self._scores) + len(self._prompt_scores)
        is_full = len(self.tokens) > MAX_WAITING_TOKENS or scores_len > MAX_WAITING_SCORES_LEN
        if is_full and self._end is None:
            self._take()
            self._sequences.fail(
                self._sequence_id,
                ResourceExhausted(
                    f"{MAX_WAITING_TOKENS} tokens or {MAX_WAITING_SCORES_LEN} bytes of log "
                    "probabilities wait for a caller that is slow"
                ),
            )
        self._woken.set()

    def close(self) -> None:
        """Stop the sequence, if it runs. Any number of times."""
        self._sequences.drop([self._sequence_id])

    async def outputs(self) -> AsyncIterator[Output]:
        """New tokens as they come, the last time with the end."""
        try:
            self._sequence_id = self._sequences.submit(self._submission, self)
            while True:
                if self._end is None:
                    await self._woken.wait()
                    self._woken.clear()
                output = self._take()
                yield output
                if output.end is not None:
                    return
        finally:
            self.close()

    def _take(self) -> Output:
        output = Output(self.tokens[:], bytes(self._scores), bytes(self._prompt_scores), self._end)
        del self.slots[:], self.tokens[:], self._scores[:], self._prompt_scores[:]
        return output
