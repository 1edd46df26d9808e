"""Several prompts of one request: their outputs in one sink, their usage in one sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.gateway.generation import Usage

if TYPE_CHECKING:
    from headrace.errors import HeadraceError
    from services.gateway.generation import EndReason, Sink


class Several:
    """Makes a sink for each prompt; `sink` hears of all of them as of one request."""

    def __init__(self, sink: Sink, num_prompts: int) -> None:
        self._sink = sink
        self._num_open = num_prompts
        self._usage = Usage(0, 0, 0)

    def part(self, first_index: int) -> Sink:
        """The sink of the prompt whose first sequence is number `first_index`."""
        return _PartSink(self, self._sink, first_index)

    def on_done(self, usage: Usage) -> None:
        """One prompt is complete."""
        total = self._usage
        self._usage = Usage(
            total.prompt_tokens + usage.prompt_tokens,
            total.completion_tokens + usage.completion_tokens,
            total.cached_tokens + usage.cached_tokens,
        )
        self._num_open -= 1
        if self._num_open == 0:
            self._sink.on_done(self._usage)

    def on_error(self, error: HeadraceError) -> None:
        """One prompt failed, and with it the request: nothing more is heard."""
        if self._num_open > 0:
            self._num_open = -1
            self._sink.on_error(error)

    @property
    def failed(self) -> bool:
        """Whether one of them failed."""
        return self._num_open < 0


class _PartSink:
    def __init__(self, several: Several, sink: Sink, first_index: int) -> None:
        self._several = several
        self._sink = sink
        self._first = first_index

    def on_delta(self, index: int, text: str, token_ids: list[int], logprobs: bytes = b"") -> None:
        if not self._several.failed:
            self._sink.on_delta(self._first + index, text, token_ids, logprobs)

    def on_prompt_logprobs(self, index: int, data: bytes) -> None:
        if not self._several.failed:
            self._sink.on_prompt_logprobs(self._first + index, data)

    def on_end(self, index: int, reason: EndReason) -> None:
        if not self._several.failed:
            self._sink.on_end(self._first + index, reason)

    def on_done(self, usage: Usage) -> None:
        if not self._several.failed:
            self._several.on_done(usage)

    def on_error(self, error: HeadraceError) -> None:
        self._several.on_error(error)
