"""A parsed HTTP request: what to generate, and how its client wants the answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from headrace.errors import InvalidArgument
from services.gateway.generation import GenerationRequest
from services.gateway.parsers import tool_parser

if TYPE_CHECKING:
    from services.gateway.parsers import AnswerFormat, ToolParser


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools may be called. `must`: one of them has to be."""

    names: tuple[str, ...]
    must: bool = False
    #: Whether one answer may hold several calls.
    parallel: bool = True

    @property
    def only(self) -> str | None:
        """The function that has to be called, if there is no choice."""
        return self.names[0] if self.must and len(self.names) == 1 else None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the answer has beside plain text. All false: sinks take their shortest way."""

    #: The likeliest tokens to show beside each; None: no log probabilities.
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    #: Whether the prompt stands before the text, and whether it is all that is shown.
    echo: bool = False
    echo_only: bool = False
    #: Sequences to show, the best of those that are generated; None: all.
    num_best: int | None = None
    obfuscate: bool = False
    tools: ToolUse | None = None

    @property
    def any(self) -> bool:
        """Whether there is anything."""
        return self != _NOTHING


_NOTHING = Wishes()


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """One request of a client; it has a generation for each of its prompts."""

    generations: tuple[GenerationRequest, ...]
    stream: bool
    include_usage: bool
    wishes: Wishes = _NOTHING
    #: Whether to say in which service tier it was served.
    names_tier: bool = False

    @property
    def generation(self) -> GenerationRequest:
        """The first, or only one."""
        return self.generations[0]

    @property
    def num_choices(self) -> int:
        """Sequences of all its prompts."""
        return len(self.generations) * self.generation.n


def with_tools(
    parsed: ParsedRequest, answer: AnswerFormat
) -> tuple[ParsedRequest, type[ToolParser] | None]:
    """The request as a model that answers in this format must be given it, and who reads its
    tool calls. Raises InvalidArgument if it calls no tools."""
    tools = parsed.wishes.tools
    if tools is None:
        return parsed, None
    generation = parsed.generation
    if not answer.tool_parser:
        raise InvalidArgument(
            f"model {generation.model!r} has no tool-call format that is known here: leave tools "
            "out, or start the gateway with --tool-parser",
            field="tools",
        )
    parser = tool_parser(answer.tool_parser)
    generation = replace(
        generation,
        skip_special_tokens=generation.skip_special_tokens and not parser.needs_special,
        answer_prefix=parser.opening(tools.only) if tools.must else "",
    )
    return replace(parsed, generations=(generation,)), parser
