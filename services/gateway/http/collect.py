"""The sink of an answer that is sent whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.gateway.http.responses import Choice

if TYPE_CHECKING:
    import asyncio

    from headrace.errors import HeadraceError
    from services.gateway.generation import EndReason, Usage
    from services.gateway.http.view import View


class CollectingSink:
    """Keeps the output of all sequences. `done` is set at the end, or raises the error.

    `view` says what the answer has beside text; None: nothing.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, n: int, view: View | None = None
    ) -> None:
        self.done: asyncio.Future[Usage] = loop.create_future()
        self._view = view
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._reasons: list[EndReason] = ["stop"] * n
        self._logprobs = [bytearray() for _ in range(n)]
        self._prompt_logprobs = [bytearray() for _ in range(n)]

    def close(self) -> None:
        """Nobody waits for `done` any more."""
        if not self.done.cancel() and not self.done.cancelled():
            # An error that nobody asked for would be logged.
            self.done.exception()

    def choices(self) -> list[Choice]:
        """The sequences, once `done`."""
        texts = ["".join(texts) for texts in self._texts]
        if self._view is None:
            return [Choice(text, reason) for text, reason in zip(texts, self._reasons, strict=True)]
        return self._view.choices(texts, self._reasons, self._logprobs, self._prompt_logprobs)

    def on_delta(self, index: int, text: str, token_ids: list[int], logprobs: bytes = b"") -> None:
        """Keep it."""
        self._texts[index].append(text)
        if logprobs:
            self._logprobs[index] += logprobs

    def on_prompt_logprobs(self, index: int, data: bytes) -> None:
        """Keep them."""
        self._prompt_logprobs[index] += data

    def on_end(self, index: int, reason: EndReason) -> None:
        """Note why sequence `index` ended."""
        self._reasons[index] = reason

    def on_done(self, usage: Usage) -> None:
        """Wake the handler."""
        if not self.done.done():
            self.done.set_result(usage)

    def on_error(self, error: HeadraceError) -> None:
        """Raise in the handler."""
        if not self.done.done():
            self.done.set_exception(error)
