"""What models write beside plain text: tool calls and reasoning, in their own formats.

A table from a format's name to its parser. Which one a model uses is read from its
chat template; a gateway can be told otherwise. Parsers see one answer's text in
pieces, and their result never depends on how it is split.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from services.gateway.parsers.base import AnswerFormat, Call, Event, Text, ToolParser

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "TOOL_PARSERS",
    "AnswerFormat",
    "Call",
    "Event",
    "Text",
    "ToolParser",
    "check_told",
    "detect",
    "tool_parser",
]

#: name -> its parser.
TOOL_PARSERS = {
    "hermes": "services.gateway.parsers.hermes:HermesParser",
    "llama3_json": "services.gateway.parsers.llama_json:LlamaJsonParser",
    "mistral": "services.gateway.parsers.mistral:MistralParser",
    "mistral_args": "services.gateway.parsers.mistral:MistralArgsParser",
}

#: What templates of a format hold, the surest first.
_MARKS = (
    ("mistral_args", "[ARGS]"),
    ("mistral", "[TOOL_CALLS]"),
    ("hermes", "<tool_call>"),
    ("llama3_json", '{"name": function name, "parameters":'),
)


def tool_parser(name: str) -> type[ToolParser]:
    """The class of an entry of `TOOL_PARSERS`."""
    module, _, attribute = TOOL_PARSERS[name].partition(":")
    found: type[ToolParser] = getattr(import_module(module), attribute)
    return found


def check_told(told: Iterable[str]) -> None:
    """Raises StartupError for an entry (see `detect`) that names no parser."""
    for entry in told:
        if entry.rpartition("=")[2] not in TOOL_PARSERS:
            names = ", ".join(TOOL_PARSERS)
            raise StartupError(f"--tool-parser must be one of {names}, or MODEL=one, not {entry!r}")


@lru_cache(maxsize=64)
def detect(model: str, template: str, told: tuple[str, ...] = ()) -> AnswerFormat:
    """How `model`, which has this chat template, writes.

    `told` says otherwise: entries `PARSER` for all models, or `MODEL=PARSER`.
    """
    parser = next((name for name, mark in _MARKS if mark in template), "")
    for entry in told:
        of, _, name = entry.rpartition("=")
        if of in ("", model):
            parser = name
    return AnswerFormat(tool_parser=parser, has_reasoning="</think>" in template)
