"""From the bytes of a request's body to a `GenerationRequest`, or a clear refusal.

Pure: no I/O, no clock. Every refusal is an InvalidArgument whose field is the
path of what is wrong (`messages[0].content`), as a client wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from headrace.errors import InvalidArgument
from headrace.params import MAX_SEQUENCES, SamplingParams
from services.gateway.generation import ChatMessage, GenerationRequest
from services.gateway.http.decode import cut, decode
from services.gateway.http.schema import (
    CHAT_NOT_YET,
    COMPLETION_NOT_YET,
    MESSAGE_NOT_YET,
    PART_NOT_YET,
    ChatBody,
    CompletionBody,
)
from services.gateway.validation import check_request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.gateway.http.schema import ContentPart, Message

#: What /v1/completions generates at most when the client does not say.
DEFAULT_COMPLETION_TOKENS = 16

#: `developer` is OpenAI's newer name for `system`; templates know the older.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_UINT32 = (1 << 32) - 1

_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request, and how its client wants the answer."""

    generation: GenerationRequest
    stream: bool
    include_usage: bool


def parse_chat(data: bytes, request_id: str) -> ParsedRequest:
    """The body of `POST /v1/chat/completions`. Raises InvalidArgument."""
    body = decode(_chat_decoder, data)
    _refuse_not_yet(body, CHAT_NOT_YET)
    if not body.messages:
        raise InvalidArgument("messages must hold at least one message", field="messages")
    messages = tuple(_message(m, f"messages[{i}]") for i, m in enumerate(body.messages))
    field, max_tokens = _chat_max_tokens(body)
    generation = GenerationRequest(
        request_id=request_id,
        model=body.model,
        messages=messages,
        sampling=_sampling(body, max_tokens, field),
        n=_n(body.n),
        stop=_strings(body.stop),
        session_id=body.prompt_cache_key or "",
    )
    check_request(generation)
    return ParsedRequest(generation, *_streaming(body))


def parse_completion(data: bytes, request_id: str) -> ParsedRequest:
    """The body of `POST /v1/completions`. Raises InvalidArgument."""
    body = decode(_completion_decoder, data)
    # The best n of n are all n.
    if body.best_of is not None and body.best_of == (body.n or 1):
        body.best_of = None
    _refuse_not_yet(body, COMPLETION_NOT_YET)
    prompt, token_ids = _prompt(body.prompt)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    generation = GenerationRequest(
        request_id=request_id,
        model=body.model,
        prompt=prompt,
        token_ids=token_ids,
        sampling=_sampling(body, max_tokens, "max_tokens"),
        n=_n(body.n),
        stop=_strings(body.stop),
    )
    check_request(generation)
    return ParsedRequest(generation, *_streaming(body))


def _refuse_not_yet(
    body: msgspec.Struct, not_yet: Mapping[str, tuple[object, ...]], path: str = ""
) -> None:
    for name, harmless in not_yet.items():
        value = getattr(body, name)
        if value is not None and value not in harmless:
            raise InvalidArgument(
                f"{path}{name} is not supported yet: leave it out", field=f"{path}{name}"
            )


def _message(message: Message, path: str) -> ChatMessage:
    role = _ROLES.get(message.role)
    if role is None:
        allowed = ", ".join(_ROLES)
        raise InvalidArgument(
            f"{path}.role must be one of {allowed}, not {_quote(message.role)}",
            field=f"{path}.role",
        )
    _refuse_not_yet(message, MESSAGE_NOT_YET, f"{path}.")
    content = message.content
    if not content and not isinstance(content, str):
        raise InvalidArgument(
            f"{path}.content must be a string or a list of text parts, not "
            f"{'null or absent' if content is None else 'empty'}",
            field=f"{path}.content",
        )
    if not isinstance(content, str):
        parts = (_part(part, f"{path}.content[{i}]") for i, part in enumerate(content))
        content = "\n".join(parts)
    return ChatMessage(role, content)


def _part(part: ContentPart, path: str) -> str:
    if part.type != "text":
        raise InvalidArgument(
            f"{path}.type must be text: {_quote(part.type)} is not supported yet",
            field=f"{path}.type",
        )
    _refuse_not_yet(part, PART_NOT_YET, f"{path}.")
    if part.text is None:
        raise InvalidArgument(f"{path}.text is required", field=f"{path}.text")
    return part.text


def _prompt(
    prompt: str | list[str | int | list[int]],
) -> tuple[str | None, tuple[int, ...] | None]:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        only = prompt[0]
        prompt = only if isinstance(only, str) else list(only)
    if not prompt:
        raise InvalidArgument("prompt must not be empty", field="prompt")
    if isinstance(prompt, str):
        return prompt, None
    token_ids = tuple(item for item in prompt if isinstance(item, int))
    if not token_ids:
        raise InvalidArgument(
            f"prompt must be one prompt: several in one request ({len(prompt)}) are not "
            "supported yet",
            field="prompt",
        )
    if len(token_ids) != len(prompt):
        raise InvalidArgument(
            "prompt must be a string or a list of token ids, not a mixture", field="prompt"
        )
    _within_uint32("prompt", token_ids)
    return None, token_ids


def _chat_max_tokens(body: ChatBody) -> tuple[str, int | None]:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidArgument(
            "max_tokens is the old name of max_completion_tokens: give one of them",
            field="max_tokens",
        )
    return ("max_tokens", old) if new is None else ("max_completion_tokens", new)


def _sampling(
    body: ChatBody | CompletionBody, max_tokens: int | None, max_tokens_field: str
) -> SamplingParams:
    if max_tokens is not None:
        _within(max_tokens_field, max_tokens, 1, _UINT32)
    top_k = 0 if body.top_k is None or body.top_k == -1 else body.top_k
    _within("top_k", top_k, 0, _UINT32)
    seed = body.seed
    if seed is not None:
        # OpenAI's seeds are signed, ours are not; both have 64 bits.
        _within("seed", seed, -(1 << 63), (1 << 64) - 1)
        seed %= 1 << 64
    stop_token_ids = tuple(body.stop_token_ids or ())
    _within_uint32("stop_token_ids", stop_token_ids)
    min_tokens = body.min_tokens or 0
    _within("min_tokens", min_tokens, 0, _UINT32)
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=top_k,
        min_p=0.0 if body.min_p is None else body.min_p,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}),
        min_tokens=min_tokens,
    )


def _logit_bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """By token id, ascending: the order in which a client writes them means nothing."""
    biases = {}
    for text, bias in given.items():
        # What int() takes beyond digits (spaces, signs, underscores) is no token id.
        token = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else -1
        if not 0 <= token <= _UINT32:
            raise InvalidArgument(
                f"logit_bias must map token ids to numbers: {_quote(text)} is none",
                field="logit_bias",
            )
        if token in biases:
            raise InvalidArgument(f"logit_bias names token {token} twice", field="logit_bias")
        biases[token] = bias
    return tuple(sorted(biases.items()))


def _n(n: int | None) -> int:
    if n is None:
        return 1
    _within("n", n, 1, MAX_SEQUENCES)
    return n


def _strings(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _streaming(body: ChatBody | CompletionBody) -> tuple[bool, bool]:
    stream, options = bool(body.stream), body.stream_options
    if options is None:
        return stream, False
    if not stream:
        raise InvalidArgument(
            "stream_options is for streams: set stream to true", field="stream_options"
        )
    if options.include_obfuscation:
        field = "stream_options.include_obfuscation"
        raise InvalidArgument(f"{field} is not supported yet: leave it out", field=field)
    return stream, bool(options.include_usage)


def _within(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidArgument(
            f"{field} must be in [{low}, {high}], not {_quote_int(value)}", field=field
        )


def _within_uint32(field: str, ids: Sequence[int]) -> None:
    if ids and (min(ids) < 0 or max(ids) > _UINT32):
        index, value = next((i, v) for i, v in enumerate(ids) if not 0 <= v <= _UINT32)
        _within(f"{field}[{index}]", value, 0, _UINT32)


def _quote(value: str) -> str:
    return f"'{cut(value)}'"


def _quote_int(value: int) -> str:
    # Python refuses to print integers of thousands of digits.
    return str(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
