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


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    """`function` of a tool call in an assistant's message; `arguments` is JSON as text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """One element of an assistant's `tool_calls`."""

    function: CalledFunction
    id: str = ""
    type: str = "function"
    #: Clients send back what they put together of a stream.
    index: int | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One element of `messages`."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    audio: Any = None
    annotations: Any = None
    function_call: Any = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Beyond OpenAI's: what an assistant thought, under the two names that are in use.
    reasoning_content: str | None = None
    reasoning: str | None = None


class FunctionDefinition(msgspec.Struct, forbid_unknown_fields=True):
    """`function` of a tool. Templates see the JSON that the client wrote."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """One element of `tools`."""

    type: str
    function: FunctionDefinition | None = None
    custom: Any = None


class FunctionName(msgspec.Struct, forbid_unknown_fields=True):
    """A function, named."""

    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    """A tool, named: in `tool_choice`."""

    type: str
    function: FunctionName | None = None


class AllowedTools(msgspec.Struct, forbid_unknown_fields=True):
    """`tool_choice.allowed_tools`."""

    mode: str
    tools: list[NamedTool]


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """`tool_choice`, if it is no word."""

    type: str
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None
    custom: Any = None


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True):
    """`response_format.json_schema`."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """`response_format`."""

    type: str
    json_schema: JsonSchemaFormat | None = None


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
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None


class CompletionBody(_Body, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    # Not yet.
    suffix: str | None = None


class ChatBody(_Body, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[msgspec.Raw] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    # Beyond OpenAI's, as vLLM has them.
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # Not yet.
    audio: Any = None
    function_call: Any = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    verbosity: str | None = None
    web_search_options: Any = None


class EmbeddingBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/embeddings`."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None


#: Parameters that do nothing yet, with the values (beside null) that ask for no more
#: than what happens anyway.
COMPLETION_NOT_YET: dict[str, tuple[object, ...]] = {"suffix": ()}

CHAT_NOT_YET: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": ("in_memory",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

#: Fields of a message, and of a part of its content, that do nothing yet.
MESSAGE_NOT_YET: dict[str, tuple[object, ...]] = {
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "function_call": (),
}
PART_NOT_YET: dict[str, tuple[object, ...]] = {"prompt_cache_breakpoint": ()}
