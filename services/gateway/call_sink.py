"""One request's output on a gRPC call.

A worker's frame calls it, and it writes each token straight into the call: no
task, queue, future or await. While the client does not take what was written, what
comes is merged, sequence by sequence, and goes out in one response each when there
is room again; a client that does not read at all fills a bound, in bytes, and
loses its request.

    on_delta ──> call takes more? ── yes ──> one response, written
                                  └─ no ───> merged ── room ──> one response a sequence

The last sequence's end waits for the usage, so that both are one response.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from headrace.errors import ResourceExhausted
from services.gateway import response_bytes
from services.gateway.generation import EndReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from headrace.errors import HeadraceError
    from services.gateway.generation import (
        Generation,
        GenerationRequest,
        Usage,
        Vocabulary,
    )

_TOKEN_LEN = 4


class Call(Protocol):
    """What a sink needs of the call that it writes to."""

    #: Whether what is sent now would wait in our memory.
    @property
    def is_blocked(self) -> bool: ...

    def send(self, message: bytes) -> None:
        """Write one serialized message."""

    def wait_for_room(self) -> None:
        """Have the sink's `on_drained` called once when the call is not blocked any more."""


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
    """A `Sink`. Made inside the loop; `generation` is set once there is one.

    `over` is set when all is written, or at the error. `send` is the call's own unless
    the request is one of a batch. With `with_texts` log probabilities have their
    tokens' bytes.
    """

    def __init__(
        self,
        request: GenerationRequest,
        call: Call,
        max_len: int,
        *,
        send: Callable[[bytes], None] | None = None,
        with_texts: bool = False,
    ) -> None:
        self.generation: Generation | None = None
        self.usage: Usage | None = None
        self.error: HeadraceError | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._call = call
        self._send = send or call.send
        self._sampling = request.sampling
        self._with_texts = with_texts
        self._prefixes = [
            response_bytes.prefix(request.request_id, index) for index in range(request.n)
        ]
        self._max_len = max_len
        self._num_open = request.n
        self._len = 0
        self._pending: dict[int, Pending] = {}

    def on_delta(self, index: int, text: str, token_ids: list[int], logprobs: bytes = b"") -> None:
        if self._pending or logprobs or self._call.is_blocked:
            self._keep(index, text, token_ids, logprobs)
            return
        if self.usage is None and self.error is None:
            self._send(response_bytes.delta(self._prefixes[index], text, token_ids))

    def on_prompt_logprobs(self, index: int, data: bytes) -> None:
        if self._has_room(len(data)):
            self._of(index).prompt_logprobs += data
            self._flush()

    def on_end(self, index: int, reason: EndReason) -> None:
        if self.error is not None:
            return
        self._of(index).reason = reason
        self._num_open -= 1
        self._flush()

    def on_done(self, usage: Usage) -> None:
        if self.error is None and self.usage is None:
            self.usage = usage
            self._flush()

    def on_error(self, error: HeadraceError) -> None:
        if self.error is None and self.usage is None:
            self.error = error
            self._num_open = 0
            self._flush()

    def on_drained(self) -> None:
        """The call takes more."""
        self._flush()

    def close(self) -> None:
        """Nobody listens any more."""
        self._pending.clear()
        if self.generation is not None:
            self.generation.cancel()

    def _keep(self, index: int, text: str, token_ids: list[int], logprobs: bytes) -> None:
        if not self._has_room(len(text) + _TOKEN_LEN * len(token_ids) + len(logprobs)):
            return
        pending = self._of(index)
        pending.text.append(text)
        pending.token_ids += token_ids
        pending.logprobs += logprobs
        self._flush()

    def _has_room(self, num_bytes: int) -> bool:
        """Whether something is to be kept; what does not fit ends the request."""
        if self.usage is not None or self.error is not None:
            return False
        self._len += num_bytes
        if self._len <= self._max_len:
            return True
        self.error = ResourceExhausted(
            f"the client reads too slowly: more than {self._max_len} bytes wait for it"
        )
        self.close()
        self._finish()
        return False

    def _of(self, index: int) -> Pending:
        pending = self._pending.get(index)
        if pending is None:
            pending = self._pending[index] = Pending()
        return pending

    def _flush(self) -> None:
        """Write what waits, if the call takes it; the last end only with the usage."""
        is_over = self.usage is not None or self.error is not None
        if self.over.done() or (self._num_open == 0 and not is_over):
            return
        if self._call.is_blocked:
            self._call.wait_for_room()
            return
        pending, self._pending = self._pending, {}
        self._len = 0
        last = len(pending)
        for number, (index, waiting) in enumerate(pending.items(), 1):
            self._send(self._response(index, waiting, self.usage if number == last else None))
        if self.usage is not None and not pending:
            self._send(self._prefixes[0] + response_bytes.rest(usage=self.usage))
        if is_over:
            self._finish()

    def _response(self, index: int, pending: Pending, usage: Usage | None) -> bytes:
        message = response_bytes.delta(
            self._prefixes[index], "".join(pending.text), pending.token_ids
        )
        if (
            pending.reason is None
            and usage is None
            and not (pending.logprobs or pending.prompt_logprobs)
        ):
            return message
        spelled = self._vocabulary.spelled if self._with_texts else None
        sampling = self._sampling
        return message + response_bytes.rest(
            reason=pending.reason,
            usage=usage,
            logprobs=response_bytes.logprobs(pending.logprobs, sampling.logprobs, spelled),
            prompt_logprobs=response_bytes.logprobs(
                pending.prompt_logprobs, sampling.prompt_logprobs, spelled
            ),
        )

    @property
    def _vocabulary(self) -> Vocabulary:
        # Tokens come after `start` returned, and with it the generation.
        assert self.generation is not None
        return self.generation.vocabulary

    def _finish(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
