"""The sink of an answer that is sent whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.gateway.http.responses import Choice

if TYPE_CHECKING:
    import asyncio

    from headrace.errors import HeadraceError
    from services.gateway.generation import EndReason, Usage


class CollectingSink:
    """Keeps the text of all sequences. `done` is set at the end, or raises the error."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, n: int) -> None:
        self.done: asyncio.Future[Usage] = loop.create_future()
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._reasons: list[EndReason] = ["stop"] * n

    def choices(self) -> list[Choice]:
        """The sequences, once `done`."""
        return [
            Choice("".join(texts), reason)
            for texts, reason in zip(self._texts, self._reasons, strict=True)
        ]

    def on_delta(self, index: int, text: str, token_ids: list[int], logprobs: bytes = b"") -> None:
        """Keep it."""
        self._texts[index].append(text)

    def on_prompt_logprobs(self, index: int, data: bytes) -> None:
        """No request asks for them here."""

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
