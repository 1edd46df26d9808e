"""One gRPC client's output, while its handler writes.

A worker's frame only appends here; the handler is woken if it waits, and then
takes all that has come. So a client that reads slowly gets several steps merged
into one response, and one that does not read at all fills a bound, in bytes, and
loses its request.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace.errors import ResourceExhausted
from services.gateway.generation import EndReason

if TYPE_CHECKING:
    from headrace.errors import HeadraceError
    from services.gateway.generation import Generation, Usage

_TOKEN_LEN = 4


@dataclass(slots=True)
class Pending:
    """What waits for the client of one sequence."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    #: Packed, see headrace.logprobs.
    logprobs: bytearray = field(default_factory=bytearray)
    prompt_logprobs: bytearray = field(default_factory=bytearray)
    reason: EndReason | None = None


class CallSink:
    """A `Sink` that one handler reads. `generation` is set once there is one."""

    def __init__(self, max_len: int) -> None:
        self.generation: Generation | None = None
        self.usage: Usage | None = None
        self.error: HeadraceError | None = None
        self._max_len = max_len
        self._len = 0
        self._pending: dict[int, Pending] = {}
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        """Nothing comes any more."""
        return self.usage is not None or self.error is not None

    async def wait(self) -> None:
        """Until there is something to take, or it is over. For one handler only."""
        if self._pending or self.is_over:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def take(self) -> dict[int, Pending]:
        """What has come since the last time, by sequence."""
        pending, self._pending = self._pending, {}
        self._len = 0
        return pending

    def on_delta(self, index: int, text: str, token_ids: list[int], logprobs: bytes = b"") -> None:
        if not self._has_room(len(text) + _TOKEN_LEN * len(token_ids) + len(logprobs)):
            return
        pending = self._of(index)
        pending.text.append(text)
        pending.token_ids += token_ids
        if logprobs:
            pending.logprobs += logprobs
        self._wake()

    def on_prompt_logprobs(self, index: int, data: bytes) -> None:
        if self._has_room(len(data)):
            self._of(index).prompt_logprobs += data
            self._wake()

    def on_end(self, index: int, reason: EndReason) -> None:
        self._of(index).reason = reason
        self._wake()

    def on_done(self, usage: Usage) -> None:
        if not self.is_over:
            self.usage = usage
        self._wake()

    def on_error(self, error: HeadraceError) -> None:
        if not self.is_over:
            self.error = error
        self._wake()

    def _has_room(self, num_bytes: int) -> bool:
        """Whether something is to be kept; what does not fit ends the request."""
        if self.is_over:
            return False
        self._len += num_bytes
        if self._len > self._max_len:
            self._overflow()
            return False
        return True

    def _of(self, index: int) -> Pending:
        pending = self._pending.get(index)
        if pending is None:
            pending = self._pending[index] = Pending()
        return pending

    def _overflow(self) -> None:
        self.error = ResourceExhausted(
            f"the client reads too slowly: more than {self._max_len} bytes wait for it"
        )
        self._pending.clear()
        if self.generation is not None:
            self.generation.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
