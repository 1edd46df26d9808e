"""Every documented parameter either works or is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params

from headrace.errors import InvalidArgument
from headrace.params import SamplingParams
from services.gateway.http.parse import ParsedRequest, parse_chat, parse_completion

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ParsedRequest:
    return parse_chat(json.dumps({**CHAT, **fields}).encode(), "req-1")


def completion(**fields: Any) -> ParsedRequest:
    return parse_completion(json.dumps({**COMPLETION, **fields}).encode(), "req-1")


def message(**fields: Any) -> ParsedRequest:
    return chat(messages=[{"role": "user", "content": "hi", **fields}])


#: Both APIs: parameter, value, where it must arrive, as what.
WORKS = [
    ("model", "org/m", "model", "org/m"),
    ("temperature", 0, "sampling.temperature", 0.0),
    ("temperature", 2, "sampling.temperature", 2.0),
    ("temperature", None, "sampling.temperature", 1.0),
    ("top_p", 0.5, "sampling.top_p", 0.5),
    ("top_p", None, "sampling.top_p", 1.0),
    ("max_tokens", 7, "sampling.max_tokens", 7),
    ("n", 16, "n", 16),
    ("n", None, "n", 1),
    ("seed", 7, "sampling.seed", 7),
    ("seed", -1, "sampling.seed", (1 << 64) - 1),
    ("seed", None, "sampling.seed", None),
    ("stop", "x", "stop", ("x",)),
    ("stop", ["x", "yz"], "stop", ("x", "yz")),
    ("stop", [], "stop", ()),
    ("stop", None, "stop", ()),
    ("user", "someone", "tenant", ""),
    ("top_k", 5, "sampling.top_k", 5),
    ("top_k", -1, "sampling.top_k", 0),
    ("min_p", 0.1, "sampling.min_p", 0.1),
    ("ignore_eos", True, "sampling.ignore_eos", True),
    ("stop_token_ids", [1, 2], "sampling.stop_token_ids", (1, 2)),
    ("stream", False, "n", 1),
    ("stream_options", None, "n", 1),
    ("frequency_penalty", 0, "sampling.frequency_penalty", 0.0),
    ("frequency_penalty", 0.1, "sampling.frequency_penalty", 0.1),
    ("presence_penalty", -2, "sampling.presence_penalty", -2.0),
    ("presence_penalty", None, "sampling.presence_penalty", 0.0),
    ("repetition_penalty", 1.2, "sampling.repetition_penalty", 1.2),
    ("repetition_penalty", None, "sampling.repetition_penalty", 1.0),
    ("logit_bias", {}, "sampling.logit_bias", ()),
    ("logit_bias", None, "sampling.logit_bias", ()),
    ("logit_bias", {"50": 100, "7": -0.5}, "sampling.logit_bias", ((7, -0.5), (50, 100.0))),
    ("min_tokens", 3, "sampling.min_tokens", 3),
    ("min_tokens", None, "sampling.min_tokens", 0),
]
CHAT_WORKS = [
    ("max_completion_tokens", 9, "sampling.max_tokens", 9),
    ("max_tokens", None, "sampling.max_tokens", None),
    ("prompt_cache_key", "family", "session_id", "family"),
    ("safety_identifier", "someone", "tenant", ""),
    ("audio", None, "n", 1),
    ("function_call", "none", "n", 1),
    ("functions", [], "n", 1),
    ("logprobs", False, "n", 1),
    ("metadata", {}, "n", 1),
    ("modalities", ["text"], "n", 1),
    ("moderation", None, "n", 1),
    ("parallel_tool_calls", True, "n", 1),
    ("prediction", None, "n", 1),
    ("prompt_cache_options", {"mode": "implicit"}, "n", 1),
    ("prompt_cache_retention", "in_memory", "n", 1),
    ("reasoning_effort", "none", "n", 1),
    ("response_format", {"type": "text"}, "n", 1),
    ("service_tier", "auto", "n", 1),
    ("store", False, "n", 1),
    ("tool_choice", "none", "n", 1),
    ("tools", [], "n", 1),
    ("top_logprobs", 0, "n", 1),
    ("verbosity", "medium", "n", 1),
    ("web_search_options", None, "n", 1),
    ("messages", [{"role": "user", "content": "x"}], "messages.0.content", "x"),
    ("messages", [{"role": "developer", "content": "x"}], "messages.0.role", "system"),
    ("messages", [{"role": "assistant", "content": ""}], "messages.0.content", ""),
    (
        "messages",
        [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}],
        "messages.0.content",
        "a\nb",
    ),
]
COMPLETION_WORKS = [
    ("max_tokens", None, "sampling.max_tokens", 16),
    ("best_of", 1, "n", 1),
    ("echo", False, "n", 1),
    ("logprobs", None, "n", 1),
    ("suffix", None, "n", 1),
    ("prompt", "x", "prompt", "x"),
    ("prompt", ["x"], "prompt", "x"),
    ("prompt", [1, 2], "token_ids", (1, 2)),
    ("prompt", [7], "token_ids", (7,)),
    ("prompt", [[1, 2]], "token_ids", (1, 2)),
]

#: Parameter, value, the param that the refusal names.
REFUSED = [
    ("temperature", 2.1, "temperature"),
    ("temperature", -0.1, "temperature"),
    ("temperature", "1", "temperature"),
    ("temperature", True, "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.5, "top_p"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -5, "max_tokens"),
    ("max_tokens", 1 << 32, "max_tokens"),
    ("max_tokens", 1.5, "max_tokens"),
    ("max_tokens", 1.0, "max_tokens"),
    ("max_tokens", "16", "max_tokens"),
    ("n", 0, "n"),
    ("n", 17, "n"),
    ("n", 10**30, "n"),
    ("seed", 1 << 64, "seed"),
    ("seed", -(1 << 63) - 1, "seed"),
    ("seed", 10**4000, "seed"),
    ("stop", "", "stop[0]"),
    ("stop", ["a", ""], "stop[1]"),
    ("stop", ["a"] * 17, "stop"),
    ("stop", ["a", 3], "stop[1]"),
    ("stop", 3, "stop"),
    ("user", 3, "user"),
    ("top_k", -2, "top_k"),
    ("top_k", 1 << 32, "top_k"),
    ("min_p", 1.1, "min_p"),
    ("ignore_eos", 1, "ignore_eos"),
    ("stop_token_ids", [1, -1], "stop_token_ids[1]"),
    ("stop_token_ids", [1 << 32], "stop_token_ids[0]"),
    ("stop_token_ids", [1] * 257, "stop_token_ids"),
    ("stop_token_ids", ["1"], "stop_token_ids[0]"),
    ("stream", "true", "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("model", None, "model"),
    ("model", "", "model"),
    ("model", 3, "model"),
    ("frequency_penalty", 2.1, "frequency_penalty"),
    ("frequency_penalty", False, "frequency_penalty"),
    ("presence_penalty", -2.5, "presence_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("logit_bias", {"5": 100.5}, "logit_bias[5]"),
    ("logit_bias", {"x": 1}, "logit_bias"),
    ("logit_bias", {" 5": 1}, "logit_bias"),
    ("logit_bias", {"5": 1, "05": 2}, "logit_bias"),
    ("logit_bias", {"4294967296": 1}, "logit_bias"),
    ("logit_bias", {str(token): 1 for token in range(1025)}, "logit_bias"),
    ("min_tokens", -1, "min_tokens"),
    ("min_tokens", 1 << 32, "min_tokens"),
    ("foo", None, "foo"),
    ("", 1, ""),
    ("x" * 100_000, 1, "x" * 64 + "…"),
]
CHAT_REFUSED = [
    ("messages", [], "messages"),
    ("messages", None, "messages"),
    ("messages", "hi", "messages"),
    ("messages", [3], "messages[0]"),
    ("max_completion_tokens", 0, "max_completion_tokens"),
    ("prompt", "x", "prompt"),
    ("audio", {"voice": "alloy", "format": "wav"}, "audio"),
    ("function_call", "auto", "function_call"),
    ("functions", [{"name": "f"}], "functions"),
    ("logprobs", True, "logprobs"),
    ("metadata", {"a": "b"}, "metadata"),
    ("modalities", ["text", "audio"], "modalities"),
    ("moderation", {"model": "m"}, "moderation"),
    ("parallel_tool_calls", False, "parallel_tool_calls"),
    ("prediction", {"type": "content", "content": "x"}, "prediction"),
    ("prompt_cache_options", {"mode": "explicit"}, "prompt_cache_options"),
    ("prompt_cache_retention", "24h", "prompt_cache_retention"),
    ("reasoning_effort", "high", "reasoning_effort"),
    ("response_format", {"type": "json_object"}, "response_format"),
    ("service_tier", "flex", "service_tier"),
    ("store", True, "store"),
    ("tool_choice", "auto", "tool_choice"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, "tool_choice"),
    ("tools", [{"type": "function", "function": {"name": "f"}}], "tools"),
    ("top_logprobs", 2, "top_logprobs"),
    ("verbosity", "low", "verbosity"),
    ("web_search_options", {}, "web_search_options"),
]
COMPLETION_REFUSED = [
    ("prompt", "", "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", [""], "prompt"),
    ("prompt", [[]], "prompt"),
    ("prompt", None, "prompt"),
    ("prompt", ["a", "b"], "prompt"),
    ("prompt", [[1], [2]], "prompt"),
    ("prompt", [1, "a"], "prompt"),
    ("prompt", [1, -1], "prompt[1]"),
    ("prompt", [1 << 32], "prompt[0]"),
    ("prompt", [1.5], "prompt[0]"),
    ("prompt", [True], "prompt[0]"),
    ("prompt", {"a": 1}, "prompt"),
    ("max_completion_tokens", 5, "max_completion_tokens"),
    ("messages", [], "messages"),
    ("best_of", 3, "best_of"),
    ("echo", True, "echo"),
    ("logprobs", 0, "logprobs"),
    ("logprobs", False, "logprobs"),
    ("suffix", "end", "suffix"),
]

#: Fields of a message, and what the refusal names.
MESSAGE_REFUSED = [
    ({"role": "tool"}, "messages[0].role"),
    ({"role": "narrator"}, "messages[0].role"),
    ({"role": 3}, "messages[0].role"),
    ({"content": None}, "messages[0].content"),
    ({"content": []}, "messages[0].content"),
    ({"content": 3}, "messages[0].content"),
    ({"content": [{"type": "text"}]}, "messages[0].content[0].text"),
    ({"content": [{"text": "x"}]}, "messages[0].content[0].type"),
    (
        {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]},
        "messages[0].content[1].type",
    ),
    (
        {"content": [{"type": "input_audio", "input_audio": {}}]},
        "messages[0].content[0].type",
    ),
    ({"content": [{"type": "file", "file": {}}]}, "messages[0].content[0].type"),
    ({"content": [{"type": "refusal", "refusal": "no"}]}, "messages[0].content[0].type"),
    ({"content": [{"type": "x", "y": 1}]}, "messages[0].content[0].y"),
    (
        {"content": [{"type": "text", "text": "", "prompt_cache_breakpoint": {}}]},
        "messages[0].content[0].prompt_cache_breakpoint",
    ),
    ({"name": "Ann"}, "messages[0].name"),
    ({"refusal": "no"}, "messages[0].refusal"),
    ({"audio": {"id": "x"}}, "messages[0].audio"),
    ({"function_call": {}}, "messages[0].function_call"),
    ({"tool_calls": [{}]}, "messages[0].tool_calls"),
    ({"tool_call_id": "x"}, "messages[0].tool_call_id"),
    ({"foo": 1}, "messages[0].foo"),
]


@pytest.mark.parametrize(("name", "value", "where", "expected"), [*WORKS, *CHAT_WORKS])
def test_chat_works(name: str, value: Any, where: str, expected: Any) -> None:
    assert _at(chat(**{name: value}).generation, where) == expected


@pytest.mark.parametrize(("name", "value", "where", "expected"), [*WORKS, *COMPLETION_WORKS])
def test_completion_works(name: str, value: Any, where: str, expected: Any) -> None:
    assert _at(completion(**{name: value}).generation, where) == expected


@pytest.mark.parametrize(("name", "value", "param"), [*REFUSED, *CHAT_REFUSED])
def test_chat_refuses(name: str, value: Any, param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        chat(**{name: value})
    _names(caught.value, param)


@pytest.mark.parametrize(("name", "value", "param"), [*REFUSED, *COMPLETION_REFUSED])
def test_completion_refuses(name: str, value: Any, param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        completion(**{name: value})
    _names(caught.value, param)


@pytest.mark.parametrize(("fields", "param"), MESSAGE_REFUSED)
def test_message_refuses(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        message(**fields)
    _names(caught.value, param)


def test_streaming() -> None:
    assert (chat().stream, chat().include_usage) == (False, False)
    assert (chat(stream=True).stream, chat(stream=True).include_usage) == (True, False)
    parsed = completion(stream=True, stream_options={"include_usage": True})
    assert (parsed.stream, parsed.include_usage) == (True, True)
    assert not chat(stream=True, stream_options={"include_obfuscation": False}).include_usage
    for options in ({"include_obfuscation": True}, {"foo": 1}, {"include_usage": 1}):
        with pytest.raises(InvalidArgument) as caught:
            chat(stream=True, stream_options=options)
        _names(caught.value, f"stream_options.{next(iter(options))}")


def test_both_names_of_max_tokens() -> None:
    both = chat(max_tokens=5, max_completion_tokens=5)
    assert both.generation.sampling.max_tokens == 5
    with pytest.raises(InvalidArgument, match="old name"):
        chat(max_tokens=5, max_completion_tokens=6)


def test_best_of_all() -> None:
    assert completion(n=3, best_of=3).generation.n == 3
    with pytest.raises(InvalidArgument, match="best_of"):
        completion(n=3, best_of=5)


def test_defaults() -> None:
    assert chat().generation.sampling == SamplingParams()
    assert completion().generation.sampling == SamplingParams(max_tokens=16)


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_required(missing: str) -> None:
    body = {name: value for name, value in CHAT.items() if name != missing}
    with pytest.raises(InvalidArgument, match=f"{missing} is required") as caught:
        parse_chat(json.dumps(body).encode(), "req-1")
    assert caught.value.field == missing


def test_texts() -> None:
    """The words of some refusals, as a client reads them."""
    for fields, text in [
        ({"foo": 1}, "unknown parameter 'foo'"),
        ({"n": "1"}, "n must be an integer or null, not a string"),
        ({"n": 99}, "n must be in [1, 16], not 99"),
        (
            {"n": 10**4000},
            "n must be in [1, 16], not an integer of 13288 bits",
        ),
        ({"temperature": 10**400}, "temperature: number out of range"),
        ({"tools": [{}]}, "tools is not supported yet: leave it out"),
        (
            {"messages": [{"role": "x", "content": ""}]},
            "messages[0].role must be one of system, developer, user, assistant, not 'x'",
        ),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            chat(**fields)
        assert caught.value.message == text


def test_tables_cover_what_openai_documents() -> None:
    """A parameter that a new release of the client brings must be decided on here."""
    documented = set(chat_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    covered = {row[0] for row in (*WORKS, *CHAT_WORKS)}
    assert documented <= covered, documented - covered
    documented = set(completion_create_params.CompletionCreateParamsBase.__annotations__)
    covered = {row[0] for row in (*WORKS, *COMPLETION_WORKS)}
    assert documented <= covered, documented - covered


def _names(error: InvalidArgument, param: str) -> None:
    assert error.field == param
    assert param in error.message
    assert len(error.message) < 300


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value
