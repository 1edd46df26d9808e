"""From the bytes of a request's body to a `GenerationRequest`, or a clear refusal.

Pure: no I/O, no clock. Every refusal is an InvalidArgument whose field is the
path of what is wrong (`messages[0].content`), as a client wrote it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from headrace.errors import InvalidArgument
from headrace.params import MAX_LOGPROBS, MAX_SEQUENCES, SamplingParams
from services.gateway.generation import GenerationRequest
from services.gateway.http.decode import decode
from services.gateway.http.messages import chat_message
from services.gateway.http.refuse import UINT32, quote, refuse_not_yet, within, within_uint32
from services.gateway.http.request import ParsedRequest, Wishes
from services.gateway.http.schema import (
    CHAT_NOT_YET,
    COMPLETION_NOT_YET,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
)
from services.gateway.http.tools import output_format, tool_use
from services.gateway.validation import MAX_PRIORITY, check_request

if TYPE_CHECKING:
    from collections.abc import Mapping

#: What /v1/completions generates at most when the client does not say.
DEFAULT_COMPLETION_TOKENS = 16
#: Prompts of one completion request.
MAX_PROMPTS = 64

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_MAX_METADATA = 16

_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)
_embedding_decoder = msgspec.json.Decoder(EmbeddingBody)
_encode = msgspec.json.Encoder().encode


def parse_chat(data: bytes, request_id: str) -> ParsedRequest:
    """The body of `POST /v1/chat/completions`. Raises InvalidArgument."""
    body = decode(_chat_decoder, data)
    refuse_not_yet(body, CHAT_NOT_YET)
    if not body.messages:
        raise InvalidArgument("messages must hold at least one message", field="messages")
    _check_metadata(body.metadata or {})
    messages = tuple([chat_message(m, f"messages[{i}]") for i, m in enumerate(body.messages)])
    field, max_tokens = _chat_max_tokens(body)
    tools, tools_json = tool_use(body)
    logprobs = _chat_logprobs(body)
    generation = GenerationRequest(
        request_id=request_id,
        model=body.model,
        messages=messages,
        sampling=_sampling(body, max_tokens, field, logprobs),
        n=_n(body.n),
        stop=_strings(body.stop),
        session_id=body.prompt_cache_key or "",
        priority=_priority(body),
        tools_json=tools_json,
        template_args_json=_template_args(body),
        add_generation_prompt=body.add_generation_prompt is not False
        and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        skip_special_tokens=body.skip_special_tokens is not False,
        bad_words=tuple(body.bad_words or ()),
        output_format=output_format(body.response_format),
    )
    if body.continue_final_message and (body.add_generation_prompt or (tools and tools.must)):
        other = "add_generation_prompt" if body.add_generation_prompt else "tool_choice"
        raise InvalidArgument(
            f"continue_final_message and {other} exclude each other",
            field="continue_final_message",
        )
    if body.add_special_tokens:
        raise InvalidArgument(
            "add_special_tokens is for completions: a chat's template writes them",
            field="add_special_tokens",
        )
    check_request(generation)
    stream, include_usage, obfuscate = _streaming(body)
    wishes = Wishes(
        logprobs=logprobs, prompt_logprobs=body.prompt_logprobs, obfuscate=obfuscate, tools=tools
    )
    names_tier = body.service_tier is not None
    return ParsedRequest((generation,), stream, include_usage, wishes, names_tier)


def parse_completion(data: bytes, request_id: str) -> ParsedRequest:
    """The body of `POST /v1/completions`. Raises InvalidArgument."""
    body = decode(_completion_decoder, data)
    refuse_not_yet(body, COMPLETION_NOT_YET)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    echo_only = bool(body.echo) and max_tokens == 0
    stream, include_usage, obfuscate = _streaming(body)
    n, num_best = _best_of(body)
    if body.logprobs is not None:
        within("logprobs", body.logprobs, 0, MAX_LOGPROBS)
    scores = body.logprobs if num_best is None else body.logprobs or 0
    sampling = _sampling(body, 1 if echo_only else max_tokens, "max_tokens", scores)
    prompts = _prompts(body.prompt)
    generations = tuple(
        [
            GenerationRequest(
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{at}",
                model=body.model,
                prompt=prompt if isinstance(prompt, str) else None,
                token_ids=None if isinstance(prompt, str) else prompt,
                sampling=sampling,
                n=n,
                stop=_strings(body.stop),
                priority=_priority(body),
                add_special_tokens=body.add_special_tokens is not False,
                skip_special_tokens=body.skip_special_tokens is not False,
                bad_words=tuple(body.bad_words or ()),
            )
            for at, prompt in enumerate(prompts)
        ]
    )
    for generation in generations:
        check_request(generation)
    wishes = Wishes(
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
        echo=bool(body.echo),
        echo_only=echo_only,
        num_best=num_best,
        obfuscate=obfuscate,
    )
    return ParsedRequest(generations, stream, include_usage, wishes)


def parse_embedding(data: bytes) -> str:
    """The model of the body of `POST /v1/embeddings`. Raises InvalidArgument."""
    body = decode(_embedding_decoder, data)
    if not body.input:
        raise InvalidArgument("input must not be empty", field="input")
    if body.encoding_format not in (None, "float", "base64"):
        raise InvalidArgument(
            f"encoding_format must be float or base64, not {quote(body.encoding_format or '')}",
            field="encoding_format",
        )
    if body.dimensions is not None:
        within("dimensions", body.dimensions, 1, UINT32)
    return body.model


def _prompts(given: str | list[str | int | list[int]]) -> list[str | tuple[int, ...]]:
    """One or several prompts, each text or token ids."""
    if not given:
        raise InvalidArgument("prompt must not be empty", field="prompt")
    if isinstance(given, str):
        return [given]
    if any(isinstance(item, int) for item in given):
        ids = tuple([item for item in given if isinstance(item, int)])
        if len(ids) != len(given):
            raise InvalidArgument(
                "prompt must be text, token ids, or a list of one of them, not a mixture",
                field="prompt",
            )
        within_uint32("prompt", ids)
        return [ids]
    if len(given) > MAX_PROMPTS:
        raise InvalidArgument(
            f"prompt must hold at most {MAX_PROMPTS} prompts, not {len(given)}", field="prompt"
        )
    prompts: list[str | tuple[int, ...]] = []
    for at, item in enumerate(given):
        field = "prompt" if len(given) == 1 else f"prompt[{at}]"
        if not item:
            raise InvalidArgument(f"{field} must not be empty", field=field)
        if isinstance(item, list):
            within_uint32(field, item)
        prompts.append(item if isinstance(item, str) else tuple(item))  # type: ignore[arg-type]
    return prompts


def _best_of(body: CompletionBody) -> tuple[int, int | None]:
    """How many sequences to generate, and how many of them to show if not all."""
    n = _n(body.n)
    if body.best_of is None or body.best_of == n:
        return n, None
    within("best_of", body.best_of, n, MAX_SEQUENCES)
    if body.stream:
        raise InvalidArgument(
            "best_of can't be more than n in a stream: which is best is known at its end",
            field="best_of",
        )
    return body.best_of, n


def _chat_logprobs(body: ChatBody) -> int | None:
    top = body.top_logprobs or 0
    within("top_logprobs", top, 0, MAX_LOGPROBS)
    if body.logprobs:
        return top
    if top:
        raise InvalidArgument("top_logprobs needs logprobs: true", field="top_logprobs")
    return None


def _template_args(body: ChatBody) -> str:
    args: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        if body.reasoning_effort not in _EFFORTS:
            raise InvalidArgument(
                f"reasoning_effort must be one of {', '.join(_EFFORTS)}, not "
                f"{quote(body.reasoning_effort)}",
                field="reasoning_effort",
            )
        args = {"reasoning_effort": body.reasoning_effort}
        if body.reasoning_effort == "none":
            args = {"enable_thinking": False}
    args |= body.chat_template_kwargs or {}
    return _encode(args).decode() if args else ""


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > _MAX_METADATA:
        raise InvalidArgument(
            f"metadata must hold at most {_MAX_METADATA} pairs, not {len(metadata)}",
            field="metadata",
        )
    for key, value in metadata.items():
        if len(key) > 64 or len(value) > 512:
            raise InvalidArgument(
                "metadata must have keys of at most 64 characters and values of at most 512: "
                f"{quote(key)} has {len(key)} and {len(value)}",
                field="metadata",
            )


def _priority(body: ChatBody | CompletionBody) -> int:
    # Higher is sooner, as over gRPC; in vLLM it is later.
    priority = body.priority or 0
    within("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
    return priority


def _chat_max_tokens(body: ChatBody) -> tuple[str, int | None]:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidArgument(
            "max_tokens is the old name of max_completion_tokens: give one of them",
            field="max_tokens",
        )
    return ("max_tokens", old) if new is None else ("max_completion_tokens", new)


def _sampling(
    body: ChatBody | CompletionBody,
    max_tokens: int | None,
    max_tokens_field: str,
    logprobs: int | None,
) -> SamplingParams:
    if max_tokens is not None:
        within(max_tokens_field, max_tokens, 1, UINT32)
    top_k = 0 if body.top_k is None or body.top_k == -1 else body.top_k
    within("top_k", top_k, 0, UINT32)
    seed = body.seed
    if seed is not None:
        # OpenAI's seeds are signed, ours are not; both have 64 bits.
        within("seed", seed, -(1 << 63), (1 << 64) - 1)
        seed %= 1 << 64
    stop_token_ids = tuple(body.stop_token_ids or ())
    within_uint32("stop_token_ids", stop_token_ids)
    prompt_logprobs = body.prompt_logprobs
    if prompt_logprobs is not None:
        within("prompt_logprobs", prompt_logprobs, 0, MAX_LOGPROBS)
        if body.stream:
            raise InvalidArgument(
                "prompt_logprobs are not streamed: set stream to false", field="prompt_logprobs"
            )
    if isinstance(body, CompletionBody) and body.echo and logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, logprobs)
    min_tokens = body.min_tokens or 0
    within("min_tokens", min_tokens, 0, UINT32)
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
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _logit_bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """By token id, ascending: the order in which a client writes them means nothing."""
    biases = {}
    for text, bias in given.items():
        # What int() takes beyond digits (spaces, signs, underscores) is no token id.
        token = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else -1
        if not 0 <= token <= UINT32:
            raise InvalidArgument(
                f"logit_bias must map token ids to numbers: {quote(text)} is none",
                field="logit_bias",
            )
        if token in biases:
            raise InvalidArgument(f"logit_bias names token {token} twice", field="logit_bias")
        biases[token] = bias
    return tuple(sorted(biases.items()))


def _n(n: int | None) -> int:
    if n is None:
        return 1
    within("n", n, 1, MAX_SEQUENCES)
    return n


def _strings(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _streaming(body: ChatBody | CompletionBody) -> tuple[bool, bool, bool]:
    """Whether to stream, with usage at the end, and with obfuscation."""
    stream, options = bool(body.stream), body.stream_options
    if options is None:
        return stream, False, False
    if not stream:
        raise InvalidArgument(
            "stream_options is for streams: set stream to true", field="stream_options"
        )
    return stream, bool(options.include_usage), bool(options.include_obfuscation)
