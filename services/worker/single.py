"""One sequence for one call: the outlet behind `GenerateSequence`.

What comes while the caller is slow gathers, bounded, for its next message. It
knows no transport.
"""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING

from headrace.errors import ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.worker.admission import Submission
    from services.worker.dispatch import End, Sequences

#: Tokens that may wait for the caller.
MAX_WAITING_TOKENS = 1 << 16


class SingleSequence:
    """An Outlet of one sequence. `outputs` is to be closed, which stops the sequence."""

    def __init__(self, sequences: Sequences, submission: Submission) -> None:
        self.slots = array("I")
        self.tokens = array("I")
        self._sequences = sequences
        self._submission = submission
        self._sequence_id = 0
        self._end: End | None = None
        self._woken = asyncio.Event()

    def end(self, end: End) -> None:
        """See Outlet."""
        self._end = end

    def flush(self) -> None:
        """See Outlet."""
        if len(self.tokens) > MAX_WAITING_TOKENS and self._end is None:
            del self.slots[:], self.tokens[:]
            self._sequences.fail(
                self._sequence_id,
                ResourceExhausted(f"{MAX_WAITING_TOKENS} tokens wait for a caller that is slow"),
            )
        self._woken.set()

    def close(self) -> None:
        """Stop the sequence, if it runs. Any number of times."""
        self._sequences.drop([self._sequence_id])

    async def outputs(self) -> AsyncIterator[tuple[array[int], End | None]]:
        """New tokens as they come, the last time with the end."""
        try:
            self._sequence_id = self._sequences.submit(self._submission, self)
            while True:
                if self._end is None:
                    await self._woken.wait()
                    self._woken.clear()
                tokens, end = self.tokens[:], self._end
                del self.slots[:], self.tokens[:]
                yield tokens, end
                if end is not None:
                    return
        finally:
            self.close()
