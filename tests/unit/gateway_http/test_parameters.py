"""Every documented parameter either works or is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params

from headrace.errors import InvalidArgument
from headrace.params import SamplingParams
from services.gateway.http.parse import parse_chat, parse_completion
from services.gateway.http.request import ParsedRequest, ToolUse

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
    ("bad_words", ["ugly"], "bad_words", ("ugly",)),
    ("prompt_logprobs", 3, "sampling.prompt_logprobs", 3),
    ("skip_special_tokens", False, "skip_special_tokens", False),
    ("priority", -7, "priority", -7),
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "g"}}
SCHEMA = {"name": "s", "schema": {"type": "object", "b": 1, "a": 2}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CHAT_WORKS = [
    ("logprobs", True, "sampling.logprobs", 0),
    ("metadata", {"a": "b"}, "n", 1),
    ("parallel_tool_calls", False, "n", 1),
    ("reasoning_effort", "high", "template_args_json", '{"reasoning_effort":"high"}'),
    ("reasoning_effort", "none", "template_args_json", '{"enable_thinking":false}'),
    (
        "chat_template_kwargs",
        {"enable_thinking": True},
        "template_args_json",
        '{"enable_thinking":true}',
    ),
    ("response_format", {"type": "json_object"}, "output_format.kind", "json_object"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": SCHEMA},
        "output_format.schema_json",
        '{"type":"object","b":1,"a":2}',
    ),
    ("tools", [TOOL, OTHER], "tools_json", json.dumps([TOOL, OTHER]).replace('}, {"ty', '},{"ty')),
    ("add_generation_prompt", False, "add_generation_prompt", False),
    ("continue_final_message", True, "continue_final_message", True),
    ("continue_final_message", True, "add_generation_prompt", False),
    ("messages", [{"role": "user", "content": "x"}], "messages.0.message_json", ""),
    (
        "messages",
        [{"role": "user", "content": "x", "name": "Ann"}],
        "messages.0.message_json",
        '{"role":"user","content":"x","name":"Ann"}',
    ),
    (
        "messages",
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "messages.0.message_json",
        '{"role":"assistant","content":"","tool_calls":[{"id":"c1","type":"function",'
        '"function":{"name":"f","arguments":{"x":1}}}]}',
    ),
    (
        "messages",
        [{"role": "tool", "content": "22", "tool_call_id": "c1"}],
        "messages.0.message_json",
        '{"role":"tool","content":"22","tool_call_id":"c1"}',
    ),
    (
        "messages",
        [{"role": "assistant", "content": "y", "reasoning_content": "hm"}],
        "messages.0.message_json",
        '{"role":"assistant","content":"y","reasoning_content":"hm"}',
    ),
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
    ("tool_choice", "none", "tools_json", ""),
    ("tools", [], "tools_json", ""),
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
    ("best_of", 3, "n", 3),
    ("best_of", 3, "sampling.logprobs", 0),
    ("echo", False, "n", 1),
    ("echo", True, "n", 1),
    ("logprobs", None, "sampling.logprobs", None),
    ("logprobs", 0, "sampling.logprobs", 0),
    ("add_special_tokens", False, "add_special_tokens", False),
    ("suffix", None, "n", 1),
    ("prompt", "x", "prompt", "x"),
    ("prompt", ["x"], "prompt", "x"),
    ("prompt", [1, 2], "token_ids", (1, 2)),
    ("prompt", [7], "token_ids", (7,)),
    ("prompt", [[1, 2]], "token_ids", (1, 2)),
    ("prompt", ["a", "b"], "request_id", "req-1-0"),
    ("prompt", [[1], "b"], "token_ids", (1,)),
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
    ("bad_words", [""], "bad_words[0]"),
    ("bad_words", ["a"] * 129, "bad_words"),
    ("prompt_logprobs", 21, "prompt_logprobs"),
    ("prompt_logprobs", -1, "prompt_logprobs"),
    ("priority", 101, "priority"),
    ("priority", -(10**400), "priority"),
    ("skip_special_tokens", 1, "skip_special_tokens"),
    ("foo", None, "foo"),
    ("", 1, ""),
    ("x" * 100_000, 1, "x" * 64 + "…"),
]
CHAT_REFUSED = [
    ("logprobs", 3, "logprobs"),
    ("top_logprobs", 21, "top_logprobs"),
    ("metadata", {"k" * 65: "v"}, "metadata"),
    ("metadata", {str(i): "v" for i in range(17)}, "metadata"),
    ("reasoning_effort", "huge", "reasoning_effort"),
    ("response_format", {"type": "xml"}, "response_format.type"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "s"}},
        "response_format.json_schema.schema",
    ),
    ("tools", [{}], "tools[0].type"),
    ("tools", [{"type": "function"}], "tools[0].function"),
    ("tools", [{"type": "custom", "custom": {"name": "c"}}], "tools[0].type"),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
    ("tools", [{"type": "function", "function": {"name": ""}}], "tools[0].function.name"),
    ("tools", [TOOL, TOOL], "tools"),
    ("tools", [3], "tools[0]"),
    (
        "tools",
        [{"type": "function", "function": {"name": "f", "parameters": 3}}],
        "tools[0].function.parameters",
    ),
    ("add_special_tokens", True, "add_special_tokens"),
    ("chat_template_kwargs", [], "chat_template_kwargs"),
    ("messages", [], "messages"),
    ("messages", None, "messages"),
    ("messages", "hi", "messages"),
    ("messages", [3], "messages[0]"),
    ("max_completion_tokens", 0, "max_completion_tokens"),
    ("prompt", "x", "prompt"),
    ("audio", {"voice": "alloy", "format": "wav"}, "audio"),
    ("function_call", "auto", "function_call"),
    ("functions", [{"name": "f"}], "functions"),
    ("modalities", ["text", "audio"], "modalities"),
    ("moderation", {"model": "m"}, "moderation"),
    ("prediction", {"type": "content", "content": "x"}, "prediction"),
    ("prompt_cache_options", {"mode": "explicit"}, "prompt_cache_options"),
    ("prompt_cache_retention", "24h", "prompt_cache_retention"),
    ("service_tier", "flex", "service_tier"),
    ("store", True, "store"),
    ("tool_choice", "auto", "tool_choice"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, "tool_choice"),
    ("top_logprobs", 2, "top_logprobs"),
    ("verbosity", "low", "verbosity"),
    ("web_search_options", {}, "web_search_options"),
]
COMPLETION_REFUSED = [
    ("prompt", ["a", ""], "prompt[1]"),
    ("prompt", [[1], [1 << 32]], "prompt[1][0]"),
    ("prompt", ["a"] * 65, "prompt"),
    ("best_of", 17, "best_of"),
    ("best_of", 0, "best_of"),
    ("logprobs", 21, "logprobs"),
    ("logprobs", True, "logprobs"),
    ("tools", [], "tools"),
    ("prompt", "", "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", [""], "prompt"),
    ("prompt", [[]], "prompt"),
    ("prompt", None, "prompt"),
    ("prompt", [1, "a"], "prompt"),
    ("prompt", [1, -1], "prompt[1]"),
    ("prompt", [1 << 32], "prompt[0]"),
    ("prompt", [1.5], "prompt[0]"),
    ("prompt", [True], "prompt[0]"),
    ("prompt", {"a": 1}, "prompt"),
    ("max_completion_tokens", 5, "max_completion_tokens"),
    ("messages", [], "messages"),
    ("logprobs", False, "logprobs"),
    ("suffix", "end", "suffix"),
]

#: Fields of a message, and what the refusal names.
MESSAGE_REFUSED = [
    ({"role": "function"}, "messages[0].role"),
    ({"role": "tool", "content": None}, "messages[0].content"),
    ({"tool_calls": [CALL]}, "messages[0].tool_calls"),
    ({"role": "assistant", "content": None}, "messages[0].content"),
    (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]},
        "messages[0].tool_calls[0].type",
    ),
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
    ({"refusal": "no"}, "messages[0].refusal"),
    ({"audio": {"id": "x"}}, "messages[0].audio"),
    ({"function_call": {}}, "messages[0].function_call"),
    ({"tool_calls": [{}]}, "messages[0].tool_calls[0].function"),
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
    assert chat(stream=True, stream_options={"include_obfuscation": True}).wishes.obfuscate
    for options in ({"foo": 1}, {"include_usage": 1}):
        with pytest.raises(InvalidArgument) as caught:
            chat(stream=True, stream_options=options)
        _names(caught.value, f"stream_options.{next(iter(options))}")


def test_both_names_of_max_tokens() -> None:
    both = chat(max_tokens=5, max_completion_tokens=5)
    assert both.generation.sampling.max_tokens == 5
    with pytest.raises(InvalidArgument, match="old name"):
        chat(max_tokens=5, max_completion_tokens=6)


#: tool_choice, the functions that the model is told of, whether one must be called, or what
#: the refusal names.
CHOICES: list[tuple[Any, list[str], bool | str]] = [
    ("auto", ["f", "g"], False),
    (None, ["f", "g"], False),
    ("required", ["f", "g"], True),
    ({"type": "function", "function": {"name": "g"}}, ["g"], True),
    (
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
        },
        ["f"],
        True,
    ),
    ("some", [], "tool_choice"),
    ({"type": "function"}, [], "tool_choice"),
    ({"type": "custom", "custom": {}}, [], "tool_choice"),
    ({"type": "function", "function": {"name": "h"}}, [], "tool_choice.function.name"),
    (
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        [],
        "tool_choice.allowed_tools.tools",
    ),
    (
        {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": [TOOL]}},
        [],
        "tool_choice.allowed_tools.tools[0].function.parameters",
    ),
]


@pytest.mark.parametrize(("choice", "names", "must"), CHOICES)
def test_tool_choice(choice: Any, names: list[str], must: bool | str) -> None:
    if isinstance(must, str):
        with pytest.raises(InvalidArgument) as caught:
            chat(tools=[TOOL, OTHER], tool_choice=choice)
        _names(caught.value, must)
        return
    parsed = chat(tools=[TOOL, OTHER], tool_choice=choice)
    assert parsed.wishes.tools == ToolUse(tuple(names), must)
    told = json.loads(parsed.generation.tools_json)
    assert [tool["function"]["name"] for tool in told] == names


def test_tools_that_may_not_be_called_are_not_told_of() -> None:
    parsed = chat(tools=[TOOL], tool_choice="none")
    assert parsed.wishes.tools is None
    assert parsed.generation.tools_json == ""
    with pytest.raises(InvalidArgument, match="needs tools"):
        chat(tool_choice="auto")


def test_several_prompts() -> None:
    parsed = completion(prompt=["a", "b"], n=2)
    assert [g.prompt for g in parsed.generations] == ["a", "b"]
    assert parsed.num_choices == 4
    assert len({g.request_id for g in parsed.generations}) == 2


def test_scoring_a_prompt_alone() -> None:
    parsed = completion(echo=True, max_tokens=0, logprobs=2)
    assert parsed.wishes.echo_only
    assert parsed.generation.sampling.max_tokens == 1
    assert parsed.generation.sampling.prompt_logprobs == 2


def test_an_answer_to_continue() -> None:
    for other in ({"add_generation_prompt": True}, {"tools": [TOOL], "tool_choice": "required"}):
        with pytest.raises(InvalidArgument, match="continue_final_message and"):
            chat(continue_final_message=True, **other)


def test_best_of_all() -> None:
    assert completion(n=3, best_of=3).generation.n == 3
    assert completion(n=3, best_of=3).wishes.num_best is None
    assert completion(n=3, best_of=5).generation.n == 5
    assert completion(n=3, best_of=5).wishes.num_best == 3
    with pytest.raises(InvalidArgument, match=r"best_of must be in \[3, 16\]"):
        completion(n=3, best_of=2)
    with pytest.raises(InvalidArgument, match="in a stream"):
        completion(n=3, best_of=5, stream=True)


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
        ({"tools": [{}]}, "tools[0].type is required"),
        ({"prediction": {}}, "prediction is not supported yet: leave it out"),
        (
            {"messages": [{"role": "x", "content": ""}]},
            "messages[0].role must be one of system, developer, user, assistant, tool, not 'x'",
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
