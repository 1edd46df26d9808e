"""What an answer has beside plain text: reasoning, tool calls, log probabilities, an echo.

A `View` is made for each request that needs one, a `SequenceView` for each of its
sequences in a stream. Both are pure but for the ids of tool calls. A request
without any of it has no view, and its tokens take a shorter way.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from headrace.blocks import unpack_tokens
from headrace.logprobs import unpack
from services.gateway.http import token_logprobs
from services.gateway.http.reader import ChatReader, Part
from services.gateway.http.responses import Choice
from services.gateway.http.token_logprobs import CompletionLogprobs, joined
from services.gateway.parsers.reasoning import ReasoningSplitter, ends_in_thought

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from services.gateway.generation import EndReason, Generation, Usage
    from services.gateway.http.request import ParsedRequest
    from services.gateway.parsers import ToolParser

#: Tokens of a prompt's end in which an opened thought would be found.
_NUM_TAIL = 8


class View:
    """One request's. Sequences are numbered over all prompts. `begin` comes before any output."""

    def __init__(
        self,
        parsed: ParsedRequest,
        *,
        has_reasoning: bool = False,
        parser: type[ToolParser] | None = None,
    ) -> None:
        self.parsed = parsed
        self.wishes = parsed.wishes
        self.is_chat = parsed.generation.messages is not None
        self._has_reasoning = has_reasoning
        self._parser = parser
        self._generations: dict[int, Generation] = {}

    def begin(self, at: int, generation: Generation) -> None:
        """The request's prompt number `at` is on its way."""
        self._generations[at] = generation

    def generation(self, index: int) -> Generation:
        """That of sequence `index`."""
        return self._generations[index // self.parsed.generation.n]

    def reader(self, index: int) -> ChatReader:
        """A reader of the chat's sequence `index`."""
        splitter = None
        prefix = self.parsed.generation.answer_prefix
        if self._has_reasoning:
            is_open = not prefix and ends_in_thought(_tail(self.generation(index)))
            splitter = ReasoningSplitter(is_open=is_open)
        return ChatReader(splitter, self._parser, self.wishes.tools, prefix)

    def usage(self, usage: Usage) -> Usage:
        """As the client may see it: what it did not ask for was not generated."""
        return replace(usage, completion_tokens=0) if self.wishes.echo_only else usage

    def prompt_text(self, index: int) -> str:
        """The prompt of sequence `index`, as it is echoed."""
        request = self.parsed.generations[index // self.parsed.generation.n]
        if request.prompt is not None:
            return request.prompt
        vocabulary = self.generation(index).vocabulary
        spelled = b"".join([vocabulary.spelled(i) for i in request.token_ids or ()])
        return spelled.decode("utf-8", "replace")

    def choices(
        self,
        texts: Sequence[str],
        reasons: Sequence[EndReason],
        logprobs: Sequence[bytearray],
        prompt_logprobs: Sequence[bytearray],
    ) -> list[Choice]:
        """All sequences, complete; only the best if that is asked for."""
        choices = [
            (self._chat_choice if self.is_chat else self._completion_choice)(index, *parts)
            for index, parts in enumerate(
                zip(texts, reasons, logprobs, prompt_logprobs, strict=True)
            )
        ]
        if self.wishes.num_best is None:
            return choices
        n = self.parsed.generation.n
        means = [self._mean(data) for data in logprobs]
        return [
            choices[index]
            for first in range(0, len(choices), n)
            for index in sorted(range(first, first + n), key=lambda i: -means[i])[
                : self.wishes.num_best
            ]
        ]

    def _mean(self, data: bytearray) -> float:
        """The mean log probability of a sequence's tokens."""
        records = unpack(data, self.parsed.generation.sampling.logprobs or 0)
        return sum(record.chosen[1] for record in records) / max(1, len(records))

    def _chat_choice(
        self, index: int, text: str, reason: EndReason, logprobs: bytearray, prompt: bytearray
    ) -> Choice:
        reader = self.reader(index)
        parts = [*reader.push(text), *reader.end()]
        entries = None
        if self.wishes.logprobs is not None:
            vocabulary = self.generation(index).vocabulary
            content = token_logprobs.chat_entries(bytes(logprobs), self.wishes.logprobs, vocabulary)
            entries = {"content": content, "refusal": None}
        return Choice(
            text="".join(part.content for part in parts),
            reason=reader.reason(reason),
            reasoning="".join(part.reasoning for part in parts),
            calls=tuple(part.call.whole() for part in parts if part.call is not None),
            logprobs=entries,
            prompt_logprobs=self._prompt_entries(index, prompt),
        )

    def _completion_choice(
        self, index: int, text: str, reason: EndReason, logprobs: bytearray, prompt: bytearray
    ) -> Choice:
        sequence = SequenceView(self, index)
        sequence.on_prompt_logprobs(prompt)
        parts = [*sequence.push(text, bytes(logprobs)), *sequence.end()]
        scored = [scores for _, scores in parts if scores is not None]
        return Choice(
            text="".join(fields["text"] for fields, _ in parts),
            reason="length" if self.wishes.echo_only else reason,
            logprobs=joined(scored) if self.wishes.logprobs is not None else None,
            prompt_logprobs=self._prompt_entries(index, prompt),
        )

    def _prompt_entries(self, index: int, data: bytearray) -> list[Any] | None:
        if self.wishes.prompt_logprobs is None:
            return None
        count = self.parsed.generation.sampling.prompt_logprobs or 0
        vocabulary = self.generation(index).vocabulary
        return token_logprobs.prompt_entries(bytes(data), count, vocabulary)


#: The fields of a choice in a stream, and its log probabilities if it has any.
Shown = tuple[dict[str, Any], dict[str, Any] | None]


class SequenceView:
    """One sequence of a stream, from its pieces to what its chunks hold."""

    def __init__(self, view: View, index: int) -> None:
        self._view = view
        self._index = index
        self._count = view.wishes.logprobs
        self._vocabulary = view.generation(index).vocabulary
        self._reader = view.reader(index) if view.is_chat else None
        self._lists = None
        if self._count is not None and not view.is_chat:
            self._lists = CompletionLogprobs(self._vocabulary, self._count)
        self._owes_echo = view.wishes.echo
        self._prompt = bytearray()

    def on_prompt_logprobs(self, data: bytes | bytearray) -> None:
        """They come before all else."""
        self._prompt += data

    def push(self, text: str, logprobs: bytes) -> list[Shown]:
        """What these characters and records complete."""
        if self._reader is None:
            return self._completion(text, logprobs)
        shown = self._chat(self._reader.push(text))
        if logprobs and self._count is not None:
            content = token_logprobs.chat_entries(logprobs, self._count, self._vocabulary)
            fields = shown.pop(0)[0] if shown else {"delta": {"content": ""}}
            shown.insert(0, (fields, {"content": content, "refusal": None}))
        return shown

    def end(self) -> list[Shown]:
        """What is left when the sequence is over."""
        if self._reader is None:
            return self._completion("", b"")
        return self._chat(self._reader.end())

    def reason(self, reason: EndReason) -> str:
        """Why it ended, as the API says it."""
        if self._view.wishes.echo_only:
            return "length"
        return reason if self._reader is None else self._reader.reason(reason)

    def _chat(self, parts: Iterable[Part]) -> list[Shown]:
        return [(fields, None) for fields in chain.from_iterable(map(_deltas, parts))]

    def _completion(self, text: str, logprobs: bytes) -> list[Shown]:
        lists: list[dict[str, list[Any]]] = []
        if self._view.wishes.echo_only:
            text, logprobs = "", b""
        if self._owes_echo:
            self._owes_echo = False
            text = self._view.prompt_text(self._index) + text
            lists += self._prompt_lists()
        if self._lists is not None and logprobs:
            lists.append(self._lists.push(logprobs))
        if not text and not lists:
            return []
        return [({"text": text}, joined(lists) if lists else None)]

    def _prompt_lists(self) -> list[dict[str, list[Any]]]:
        if self._lists is None:
            return []
        generation = self._view.generation(self._index)
        count = self._view.parsed.generation.sampling.prompt_logprobs or 0
        first = unpack_tokens(generation.prompt_ids[:4])[0]
        return [self._lists.first(first), self._lists.prompt(bytes(self._prompt), count)]


def _deltas(part: Part) -> Iterable[dict[str, Any]]:
    if part.call is not None:
        return ({"delta": {"tool_calls": [delta]}} for delta in part.call.deltas())
    if part.reasoning:
        return ({"delta": {"reasoning_content": part.reasoning}},)
    return ({"delta": {"content": part.content}},)


def _tail(generation: Generation) -> str:
    """The text of the prompt's last tokens."""
    ids = unpack_tokens(generation.prompt_ids[-4 * _NUM_TAIL :])
    return b"".join([generation.vocabulary.spelled(i) for i in ids]).decode("utf-8", "replace")
