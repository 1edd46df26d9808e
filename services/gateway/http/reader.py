"""One chat answer as it grows: reasoning, content and tool calls apart. Pure but for ids.

A part is what one delta of a stream holds; the parts of an answer, put together as
clients do it, are its message.
"""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.gateway.parsers import Call

if TYPE_CHECKING:
    from services.gateway.generation import EndReason
    from services.gateway.http.request import ToolUse
    from services.gateway.parsers import ToolParser
    from services.gateway.parsers.reasoning import ReasoningSplitter

_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as it is answered; `arguments` is a JSON object."""

    index: int
    id: str
    name: str
    arguments: str

    def whole(self) -> dict[str, Any]:
        """As a message has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    def deltas(self) -> tuple[dict[str, Any], ...]:
        """As a stream has it: who is called, then with what."""
        function = {"name": self.name, "arguments": ""}
        opening = {"index": self.index, "id": self.id, "type": "function", "function": function}
        return opening, {"index": self.index, "function": {"arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Part:
    """One of the three."""

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


class ChatReader:
    """One sequence's text in pieces. The first comes from `prefix`, which the prompt ends with."""

    def __init__(
        self,
        splitter: ReasoningSplitter | None,
        parser: type[ToolParser] | None,
        tools: ToolUse | None,
        prefix: str,
    ) -> None:
        self._splitter = splitter
        self._parser = None if parser is None or tools is None else parser(tools.names)
        self._id_len = 0 if parser is None else parser.id_len
        self._parallel = tools is None or tools.parallel
        self._num_calls = 0
        if prefix and self._parser is not None:
            # It is no more than the beginning of a call.
            self._parser.push(prefix)

    def push(self, text: str) -> list[Part]:
        """What these characters complete."""
        if self._splitter is None:
            return self._content(text)
        parts: list[Part] = []
        for piece in self._splitter.push(text):
            parts += (
                [Part(reasoning=piece.text)] if piece.is_reasoning else self._content(piece.text)
            )
        return parts

    def end(self) -> list[Part]:
        """What is left when the sequence is over."""
        parts: list[Part] = []
        for piece in self._splitter.end() if self._splitter else ():
            parts += (
                [Part(reasoning=piece.text)] if piece.is_reasoning else self._content(piece.text)
            )
        if self._parser is not None:
            parts += self._read(self._parser.end())
        return parts

    def reason(self, reason: EndReason) -> str:
        """Why it ended, as the API says it."""
        return "tool_calls" if self._num_calls and reason == "stop" else reason

    def _content(self, text: str) -> list[Part]:
        if self._parser is not None:
            return self._read(self._parser.push(text))
        return [Part(content=text)] if text else []

    def _read(self, events: Any) -> list[Part]:
        parts = []
        for event in events:
            if not isinstance(event, Call):
                parts.append(Part(content=event.text))
            elif self._parallel or not self._num_calls:
                call = ToolCall(self._num_calls, self._new_id(), event.name, event.arguments)
                parts.append(Part(call=call))
                self._num_calls += 1
        return parts

    def _new_id(self) -> str:
        if self._id_len:
            return "".join(secrets.choice(_ALPHABET) for _ in range(self._id_len))
        return f"call_{secrets.token_hex(12)}"
