"""The JSON of answers, byte for byte as OpenAI's clients expect it. Pure.

A stream's chunks differ in one string: `EventTemplate` encodes the rest once per
request, so that a token costs one string escape and one concatenation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.gateway.generation import ServedModel, Usage

OWNED_BY = "headrace"
#: All are served alike.
SERVICE_TIER = "default"

#: What ends a stream that went well.
DONE_EVENT = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What all pieces of one answer repeat."""

    id: str
    created: int
    model: str
    names_tier: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One complete sequence."""

    text: str
    reason: str
    reasoning: str = ""
    #: Tool calls, as a message has them.
    calls: tuple[dict[str, Any], ...] = ()
    logprobs: dict[str, Any] | None = None
    prompt_logprobs: list[Any] | None = None


def chat_body(head: ResponseHead, choices: Sequence[Choice], usage: Usage) -> bytes:
    """A `chat.completion`."""
    listed = [
        {
            "index": index,
            "message": _message(choice),
            "logprobs": choice.logprobs,
            "finish_reason": choice.reason,
        }
        for index, choice in enumerate(choices)
    ]
    body = _body(head, "chat.completion", listed, usage)
    if choices[0].prompt_logprobs is not None:
        body["prompt_logprobs"] = choices[0].prompt_logprobs
    return encode(body)


def _message(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.calls:
        message["tool_calls"] = choice.calls
    if choice.calls or choice.reasoning:
        message["content"] = choice.text or None
    return message


def completion_body(head: ResponseHead, choices: Sequence[Choice], usage: Usage) -> bytes:
    """A `text_completion`."""
    listed = []
    for index, choice in enumerate(choices):
        entry: dict[str, Any] = {
            "index": index,
            "text": choice.text,
            "logprobs": choice.logprobs,
            "finish_reason": choice.reason,
        }
        if choice.prompt_logprobs is not None:
            entry["prompt_logprobs"] = choice.prompt_logprobs
        listed.append(entry)
    return encode(_body(head, "text_completion", listed, usage))


class EventTemplate:
    """The events of one stream, encoded but for the text.

    An event with text is `prefixes[index] + JSON string + suffix`; `opening` goes
    before all others.
    """

    def __init__(
        self,
        head: ResponseHead,
        *,
        kind: str,
        before_text: bytes,
        after_text: bytes,
        empty: bytes,
        opening_choice: bytes,
        n: int,
        include_usage: bool,
    ) -> None:
        tier = b'"service_tier":%b,' % encode(SERVICE_TIER) if head.names_tier else b""
        self._head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,%b"choices":[' % (
            encode(head.id),
            kind.encode(),
            head.created,
            encode(head.model),
            tier,
        )
        # With include_usage every chunk has the field, and only the last a value.
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._empty = empty
        self._include_usage = include_usage
        self.prefixes = tuple(b'%b{"index":%d,%b' % (self._head, i, before_text) for i in range(n))
        self.suffix = b'%b,"logprobs":null,"finish_reason":null}%b' % (after_text, self._tail)
        self.opening = b"".join(self._choice(i, opening_choice) for i in range(n) if opening_choice)

    def text(self, index: int, text: str) -> bytes:
        """The plain twin of what a sink does for each token."""
        return self.prefixes[index] + encode(text) + self.suffix

    def shown(
        self, index: int, fields: dict[str, Any], logprobs: dict[str, Any] | None, padding: str
    ) -> bytes:
        """An event with more than text; `padding` hides its length (see OpenAI's obfuscation)."""
        rest = b'%b,"logprobs":%b,"finish_reason":null}' % (encode(fields)[1:-1], encode(logprobs))
        event = self._choice(index, rest)
        return event[:-3] + b',"obfuscation":%b}\n\n' % encode(padding) if padding else event

    def end(self, index: int, reason: str) -> bytes:
        """The event that ends sequence `index`."""
        rest = b'%b,"logprobs":null,"finish_reason":%b}' % (self._empty, encode(reason))
        return self._choice(index, rest)

    def closing(self, usage: Usage) -> bytes:
        """What ends a stream that went well."""
        if not self._include_usage:
            return DONE_EVENT
        return b'%b],"usage":%b}\n\n%b' % (self._head, encode(_usage(usage)), DONE_EVENT)

    def _choice(self, index: int, rest: bytes) -> bytes:
        return b'%b{"index":%d,%b%b' % (self._head, index, rest, self._tail)


def chat_events(head: ResponseHead, *, n: int, include_usage: bool) -> EventTemplate:
    """The events of `chat.completion.chunk`s."""
    return EventTemplate(
        head,
        kind="chat.completion.chunk",
        before_text=b'"delta":{"content":',
        after_text=b"}",
        empty=b'"delta":{}',
        opening_choice=b'"delta":{"role":"assistant","content":"","refusal":null},'
        b'"logprobs":null,"finish_reason":null}',
        n=n,
        include_usage=include_usage,
    )


def completion_events(head: ResponseHead, *, n: int, include_usage: bool) -> EventTemplate:
    """The events of streamed `text_completion`s."""
    return EventTemplate(
        head,
        kind="text_completion",
        before_text=b'"text":',
        after_text=b"",
        empty=b'"text":""',
        opening_choice=b"",
        n=n,
        include_usage=include_usage,
    )


def error_event(body: bytes) -> bytes:
    """What ends a stream that failed, from the JSON of the error."""
    return b"data: %b\n\n" % body


def models_body(models: Sequence[ServedModel]) -> bytes:
    """The answer of `GET /v1/models`."""
    return encode({"object": "list", "data": [_model(model) for model in models]})


def model_body(model: ServedModel) -> bytes:
    """The answer of `GET /v1/models/{id}`."""
    return encode(_model(model))


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": OWNED_BY,
        "max_model_len": model.context_len,
    }


def _body(
    head: ResponseHead, kind: str, choices: list[dict[str, Any]], usage: Usage
) -> dict[str, Any]:
    body = {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": _usage(usage),
    }
    if head.names_tier:
        body["service_tier"] = SERVICE_TIER
    return body


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
