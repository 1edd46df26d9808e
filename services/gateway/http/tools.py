"""`tools`, `tool_choice` and `response_format`, from their types to our own. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from headrace.errors import InvalidArgument
from services.gateway.generation import OutputFormat
from services.gateway.http.decode import decode
from services.gateway.http.refuse import quote
from services.gateway.http.request import ToolUse
from services.gateway.http.schema import Tool

if TYPE_CHECKING:
    from services.gateway.http.schema import ChatBody, NamedTool, ResponseFormat, ToolChoice

MAX_TOOLS = 128
_MAX_NAME_LEN = 64
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")

_tool_decoder = msgspec.json.Decoder(Tool)


def tool_use(body: ChatBody) -> tuple[ToolUse | None, str]:
    """What may be called, and the JSON of its definitions for the template.

    Raises InvalidArgument. With `tool_choice` none the model is told of no tools.
    """
    given = {}
    for at, raw in enumerate(body.tools or ()):
        name = _name(bytes(raw), f"tools[{at}]")
        if name in given:
            raise InvalidArgument(f"tools names the function {quote(name)} twice", field="tools")
        given[name] = raw
    if len(given) > MAX_TOOLS:
        raise InvalidArgument(
            f"tools must hold at most {MAX_TOOLS} tools, not {len(given)}", field="tools"
        )
    choice = body.tool_choice if body.tool_choice is not None else "auto" if given else "none"
    if choice == "none":
        return None, ""
    if not given:
        raise InvalidArgument("tool_choice needs tools to choose from", field="tool_choice")
    names, must = _chosen(choice, tuple(given))
    definitions = b",".join(bytes(given[name]) for name in names).decode()
    use = ToolUse(names, must, parallel=body.parallel_tool_calls is not False)
    return use, f"[{definitions}]"


def _name(raw: bytes, path: str) -> str:
    tool = decode(_tool_decoder, raw, path)
    if tool.type != "function":
        raise InvalidArgument(
            f"{path}.type must be function: {quote(tool.type)} is not supported yet",
            field=f"{path}.type",
        )
    if tool.function is None or tool.custom is not None:
        raise InvalidArgument(f"{path}.function is required", field=f"{path}.function")
    name = tool.function.name
    if not 1 <= len(name) <= _MAX_NAME_LEN or not _NAME_CHARS.issuperset(name):
        raise InvalidArgument(
            f"{path}.function.name must have 1 to {_MAX_NAME_LEN} letters, digits, underscores, "
            f"dashes or dots, not {quote(name)}",
            field=f"{path}.function.name",
        )
    return name


def _chosen(choice: str | ToolChoice, given: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """The tools that may be called, and whether one has to be."""
    if isinstance(choice, str):
        return given, _must(choice, "tool_choice", ("none", "auto", "required"))
    if choice.type == "function" and choice.function is not None:
        return (_known(choice.function.name, given, "tool_choice.function.name"),), True
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        path = "tool_choice.allowed_tools"
        names = [
            _known(_named(tool, f"{path}.tools[{at}]"), given, f"{path}.tools[{at}].function.name")
            for at, tool in enumerate(choice.allowed_tools.tools)
        ]
        if not names:
            raise InvalidArgument(f"{path}.tools must not be empty", field=f"{path}.tools")
        must = _must(choice.allowed_tools.mode, f"{path}.mode", ("auto", "required"))
        return tuple(dict.fromkeys(names)), must
    raise InvalidArgument(
        "tool_choice.type must be function or allowed_tools, with a member of that name, not "
        f"{quote(choice.type)}",
        field="tool_choice",
    )


def _must(word: str, field: str, allowed: tuple[str, ...]) -> bool:
    if word not in allowed:
        raise InvalidArgument(
            f"{field} must be one of {', '.join(allowed)}, not {quote(word)}", field=field
        )
    return word == "required"


def _named(tool: NamedTool, path: str) -> str:
    if tool.type != "function" or tool.function is None:
        raise InvalidArgument(f"{path} must be a function, with its name", field=path)
    return tool.function.name


def _known(name: str, given: tuple[str, ...], field: str) -> str:
    if name not in given:
        raise InvalidArgument(f"{field} {quote(name)} is none of tools", field=field)
    return name


def output_format(given: ResponseFormat | None) -> OutputFormat | None:
    """What the text must be; None: anything. Raises InvalidArgument."""
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return OutputFormat("json_object")
    if given.type != "json_schema":
        raise InvalidArgument(
            "response_format.type must be one of text, json_object, json_schema, not "
            f"{quote(given.type)}",
            field="response_format.type",
        )
    if given.json_schema is None or given.json_schema.schema is None:
        field = "response_format.json_schema"
        field += "" if given.json_schema is None else ".schema"
        raise InvalidArgument(f"{field} is required", field=field)
    schema = msgspec.json.encode(given.json_schema.schema)
    return OutputFormat("json_schema", schema.decode())
