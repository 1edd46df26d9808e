"""Calls' arguments as the wire's messages. The server checks values; here only what can't be sent.

Raises InvalidArgument naming the argument.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

from headrace.errors import InvalidArgument
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

#: Text to go on with, the messages of a chat, or token ids.
Input = str | Sequence[int] | Sequence[Mapping[str, Any]]


class Options(TypedDict, total=False):
    """How to generate. What is left out takes the server's default; see the protos for limits."""

    #: The model; may be left out where one is served.
    model: str
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    #: Sequences to generate.
    n: int
    #: Strings that end a sequence.
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    #: What is added to tokens' logits, by id.
    logit_bias: Mapping[int, float]
    #: Words that must not be generated.
    bad_words: Sequence[str]
    #: Report log probabilities, of each token and of so many likeliest.
    logprobs: int
    prompt_logprobs: int
    #: With the tokens' bytes.
    return_token_texts: bool
    skip_special_tokens: bool
    add_special_tokens: bool
    #: Tool definitions for the chat template.
    tools: Sequence[Mapping[str, Any]]
    #: Further variables of the chat template.
    template_args: Mapping[str, Any]
    #: Let the answer go on with the last message.
    continue_final_message: bool
    add_generation_prompt: bool
    priority: int
    user: str
    session_id: str
    #: Seconds for the whole call, retries included.
    timeout_s: float


_SAMPLING = frozenset(types_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
_PLAIN = frozenset(pb.GenerateRequest.DESCRIPTOR.fields_by_name) - {
    "prompt", "chat", "token_ids", "sampling", "model",
}  # fmt: skip
_CHAT: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "tools": ("tools_json", json.dumps),
    "template_args": ("template_args_json", json.dumps),
    "continue_final_message": ("continue_final_message", bool),
    "add_generation_prompt": ("add_generation_prompt", bool),
}


def generate_request(given: Input, model: str, options: Options) -> pb.GenerateRequest:
    """One request. Options that are None count as left out."""
    request = pb.GenerateRequest(model=model)
    _set_input(request, given)
    for name, value in options.items():
        if value is None or name in ("model", "timeout_s"):
            continue
        try:
            _set_option(request, name, value)
        except (AttributeError, TypeError, ValueError) as error:
            raise InvalidArgument(f"{name} can't be {value!r:.80}: {error}", field=name) from error
    return request


def _set_input(request: pb.GenerateRequest, given: Input) -> None:
    if isinstance(given, str):
        request.prompt = given
        return
    items = list(cast("Sequence[Any]", given))
    if items and all(isinstance(item, Mapping) for item in items):
        request.chat.messages.extend(map(_message, items))
        return
    try:
        request.token_ids.ids.extend(items)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"the input must be text, messages or token ids: {error}", field="input"
        ) from error


def _message(message: Mapping[str, Any]) -> pb.Message:
    if message.keys() == {"role", "content"} and isinstance(message["content"], str):
        return pb.Message(role=message["role"], content=message["content"])
    return pb.Message(message_json=json.dumps(dict(message)))


def _set_option(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if name in _CHAT:
        field, convert = _CHAT[name]
        setattr(request.chat, field, convert(value))
        return
    if name in _SAMPLING:
        target: Any = request.sampling
    elif name in _PLAIN:
        target = request
    else:
        raise TypeError("there is no such option")
    if name == "stop" and isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping):
        getattr(target, name).update(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        getattr(target, name).extend(value)
    else:
        setattr(target, name, value)


def embed_request(
    inputs: Sequence[str | Sequence[int]], model: str, dimensions: int | None, truncate: bool
) -> pb.EmbedRequest:
    """One request of Embed."""
    request = pb.EmbedRequest(model=model, dimensions=dimensions, truncate=truncate)
    for one in inputs:
        if isinstance(one, str):
            request.inputs.add(text=one)
        else:
            request.inputs.add().token_ids.ids.extend(one)
    return request
