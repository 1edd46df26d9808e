"""The bodies that OpenAI documents, as types: what may stand in a request.

Every documented parameter is here, those that nobody serves yet too, so that
they are refused by name and not as unknown. Types are strict: no string becomes
a number. What values mean, and which of them work, is for `parse`.
"""

from __future__ import annotations

from typing import Any

import msgspec


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
    """One part of a message's content; `type` says which of the others is set."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None
    prompt_cache_breakpoint: Any = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One element of `messages`."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: str | None = None


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both APIs have. An absent field and null mean the API's default."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Beyond OpenAI's, as vLLM has them.
    top_k: int | None = None
    min_p: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None


class CompletionBody(_Body, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    # Not yet.
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class ChatBody(_Body, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Not yet.
    audio: Any = None
    function_call: Any = None
    functions: list[Any] | None = None
    logprobs: bool | None = None
    metadata: dict[str, str] | None = None
    modalities: list[str] | None = None
    moderation: Any = None
    parallel_tool_calls: bool | None = None
    prediction: Any = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    response_format: dict[str, Any] | None = None
    service_tier: str | None = None
    store: bool | None = None
    tool_choice: Any = None
    tools: list[Any] | None = None
    top_logprobs: int | None = None
    verbosity: str | None = None
    web_search_options: Any = None


#: Parameters that do nothing yet, with the values (beside null) that ask for no more
#: than what happens anyway.
COMPLETION_NOT_YET: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": (),
}

CHAT_NOT_YET: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

#: Fields of a message, and of a part of its content, that do nothing yet.
MESSAGE_NOT_YET: dict[str, tuple[object, ...]] = {
    "name": (),
    "refusal": (),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
}
PART_NOT_YET: dict[str, tuple[object, ...]] = {"prompt_cache_breakpoint": ()}
