"""What waits for one KServe call: its requests' output, until the call's handler takes it.

Frames of workers only append here and wake the handler, so that a slow client gets
several steps merged into one response. A client that does not read at all fills a bound,
in bytes; then the call is cut. Knows no protos.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.gateway.generation import EndReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from headrace.errors import HeadraceError
    from services.gateway.generation import Generation, Usage
    from services.gateway.kserve.options import TextRequest

#: What a response weighs beside its text, roughly.
_RESPONSE_LEN = 64


class Outbox:
    """All that waits for one call, of any number of requests. `on_overflow` is called once,
    when more than `max_len` bytes do."""

    def __init__(self, max_len: int, on_overflow: Callable[[], None]) -> None:
        self._max_len = max_len
        self._on_overflow = on_overflow
        self._len = 0
        self._ready: dict[InferSink, None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._is_cut = False

    async def wait(self) -> None:
        """Until something is ready or `wake` is called. For one handler only."""
        if self._ready:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def take(self) -> list[InferSink]:
        """The requests that have something for the client, in the order in which it came."""
        ready, self._ready = list(self._ready), {}
        self._len = 0
        return ready

    def put(self, sink: InferSink, num_bytes: int) -> None:
        """`sink` has so much more for the client."""
        if self._is_cut:
            return
        self._ready[sink] = None
        self._len += num_bytes
        if self._len > self._max_len:
            self._is_cut = True
            self._ready.clear()
            self._on_overflow()
        self.wake()

    def wake(self) -> None:
        """Let the handler look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True)
class Output:
    """What one sequence has since it was last taken."""

    text: list[str] = field(default_factory=list)
    num_tokens: int = 0
    reason: EndReason | None = None


class InferSink:
    """A `Sink` of one request. `generation` is set once there is one."""

    __slots__ = ("_outbox", "_outputs", "error", "generation", "request", "usage")

    def __init__(self, request: TextRequest, outbox: Outbox) -> None:
        self.request = request
        self.generation: Generation | None = None
        self.usage: Usage | None = None
        self.error: HeadraceError | None = None
        self._outbox = outbox
        self._outputs = [Output() for _ in range(request.generation.n)]

    @property
    def is_over(self) -> bool:
        """Nothing comes any more."""
        return self.usage is not None or self.error is not None

    def take(self) -> list[Output]:
        """What has come since the last time, by sequence."""
        outputs, self._outputs = self._outputs, [Output() for _ in self._outputs]
        return outputs

    def on_delta(self, index: int, text: str, token_ids: list[int], logprobs: bytes = b"") -> None:
        output = self._outputs[index]
        if text:
            output.text.append(text)
        output.num_tokens += len(token_ids)
        if self.request.stream:
            self._outbox.put(self, len(text) + _RESPONSE_LEN)

    def on_prompt_logprobs(self, index: int, data: bytes) -> None:
        """No request asks for them here."""

    def on_end(self, index: int, reason: EndReason) -> None:
        self._outputs[index].reason = reason

    def on_done(self, usage: Usage) -> None:
        self.usage = usage
        # A streamed one's text has been counted as it came.
        pieces = () if self.request.stream else (o.text for o in self._outputs)
        self._outbox.put(self, _RESPONSE_LEN + sum(len(t) for text in pieces for t in text))

    def on_error(self, error: HeadraceError) -> None:
        if not self.is_over:
            self.error = error
        self._outbox.put(self, _RESPONSE_LEN)
