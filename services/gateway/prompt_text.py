"""A rendered chat, when it must end otherwise than its template lets it end. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.errors import InvalidArgument
from services.gateway.parsers.reasoning import CLOSE, ends_in_thought

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.gateway.generation import ChatMessage


def continued(text: str, messages: Sequence[ChatMessage]) -> str:
    """`text` up to the end of its last message, without what its template puts behind it.

    Raises InvalidArgument if the message does not stand in the text as it was given.
    """
    content = messages[-1].content.strip() if messages else ""
    at = text.rfind(content) if content else -1
    if at < 0:
        raise InvalidArgument(
            "continue_final_message needs a last message whose text the template shows as it is",
            field="continue_final_message",
        )
    return text[: at + len(content)]


def with_prefix(text: str, prefix: str) -> str:
    """`text`, and then how the answer begins; a thought that the template opened is closed."""
    if prefix and ends_in_thought(text):
        return f"{text.rstrip()}\n\n{CLOSE}\n\n{prefix}"
    return text + prefix
