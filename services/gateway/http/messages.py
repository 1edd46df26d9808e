"""A chat's messages, from the types of its body to what a template is given. Pure.

A message with no more than a role and text stays that; any other goes to the
template whole, as JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from headrace.errors import InvalidArgument
from services.gateway.generation import ChatMessage
from services.gateway.http.refuse import quote, refuse_not_yet
from services.gateway.http.schema import MESSAGE_NOT_YET, PART_NOT_YET

if TYPE_CHECKING:
    from services.gateway.http.schema import ContentPart, Message, ToolCall

#: `developer` is OpenAI's newer name for `system`; templates know the older.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

_encode = msgspec.json.Encoder().encode


def chat_message(message: Message, path: str) -> ChatMessage:
    """One message. Raises InvalidArgument naming the field below `path`."""
    role = _ROLES.get(message.role)
    if role is None:
        allowed = ", ".join(_ROLES)
        raise InvalidArgument(
            f"{path}.role must be one of {allowed}, not {quote(message.role)}",
            field=f"{path}.role",
        )
    refuse_not_yet(message, MESSAGE_NOT_YET, f"{path}.")
    if message.tool_calls and role != "assistant":
        field = f"{path}.tool_calls"
        raise InvalidArgument(f"{field} is for the role assistant, not {role}", field=field)
    if message.tool_call_id is not None and role != "tool":
        field = f"{path}.tool_call_id"
        raise InvalidArgument(f"{field} is for the role tool, not {role}", field=field)
    thought = message.reasoning_content or message.reasoning
    content = _content(message, path, may_lack=bool(message.tool_calls or thought))
    whole: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        whole["name"] = message.name
    if message.tool_call_id is not None:
        whole["tool_call_id"] = message.tool_call_id
    if thought:
        whole["reasoning_content"] = thought
    if message.tool_calls:
        whole["tool_calls"] = [
            _tool_call(call, f"{path}.tool_calls[{at}]")
            for at, call in enumerate(message.tool_calls)
        ]
    as_json = "" if len(whole) == 2 else _encode(whole).decode()
    return ChatMessage(role, content, as_json)


def _content(message: Message, path: str, *, may_lack: bool) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if not content:
        if may_lack:
            return ""
        raise InvalidArgument(
            f"{path}.content must be a string or a list of text parts, not "
            f"{'null or absent' if content is None else 'empty'}",
            field=f"{path}.content",
        )
    return "\n".join(_part(part, f"{path}.content[{i}]") for i, part in enumerate(content))


def _part(part: ContentPart, path: str) -> str:
    if part.type != "text":
        raise InvalidArgument(
            f"{path}.type must be text: {quote(part.type)} is not supported yet",
            field=f"{path}.type",
        )
    refuse_not_yet(part, PART_NOT_YET, f"{path}.")
    if part.text is None:
        raise InvalidArgument(f"{path}.text is required", field=f"{path}.text")
    return part.text


def _tool_call(call: ToolCall, path: str) -> dict[str, Any]:
    """As templates expect it: the arguments are an object, not JSON as text."""
    if call.type != "function":
        raise InvalidArgument(
            f"{path}.type must be function: {quote(call.type)} is not supported yet",
            field=f"{path}.type",
        )
    field = f"{path}.function.arguments"
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{field} is no JSON: {error}", field=field) from error
    if not isinstance(arguments, dict):
        raise InvalidArgument(f"{field} is JSON, but no object", field=field)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
