"""Whatever a body holds, the answer is 2xx or 4xx."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import InvalidArgument
from services.gateway.http.errors import error_body, problem_of
from services.gateway.http.parse import parse_chat, parse_completion
from services.gateway.http.request import ParsedRequest
from services.gateway.http.schema import (
    ChatBody,
    CompletionBody,
    ContentPart,
    FunctionDefinition,
    Message,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolChoice,
)

NAMES = sorted(
    {
        name
        for struct in (
            ChatBody,
            CompletionBody,
            ContentPart,
            FunctionDefinition,
            Message,
            ResponseFormat,
            Tool,
            ToolCall,
            ToolChoice,
        )
        for name in struct.__struct_fields__
    }
    | {"", "foo", "include_usage"}
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.sampled_from(["user", "system", "text", "m", "none"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
PATHS = ["/v1/chat/completions", "/v1/completions"]
BASES: list[dict[str, Any]] = [
    {},
    {"model": "org/echo", "messages": [{"role": "user", "content": "hi"}]},
    {"model": "org/echo", "prompt": "hi"},
]


@settings(max_examples=400, deadline=None)
@given(base=st.sampled_from(BASES), body=BODIES)
def test_any_json_is_parsed_or_refused(base: dict[str, Any], body: dict[str, Any]) -> None:
    data = json.dumps({**base, **body}).encode()
    for parse in (parse_chat, parse_completion):
        _check(_parse_or_refuse(parse, data))


@settings(max_examples=400, deadline=None)
@given(data=st.binary())
def test_any_bytes_are_refused(data: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        assert _parse_or_refuse(parse, data) is None


@settings(max_examples=400, deadline=None)
@given(cut=st.integers(0, 200), flip=st.integers(0, 200), byte=st.integers(0, 255))
def test_damaged_json(cut: int, flip: int, byte: int) -> None:
    good = json.dumps({"model": "m", "prompt": "hé", "stop": ["a"], "seed": 5}, ensure_ascii=False)
    data = bytearray(good.encode())
    data[flip % len(data)] = byte
    _check(_parse_or_refuse(parse_completion, bytes(data[: len(data) - cut % len(data)])))


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(base=st.sampled_from(BASES), body=BODIES, path=st.sampled_from(PATHS))
async def test_any_json_over_http(
    edge: Any, connect: Any, base: dict[str, Any], body: dict[str, Any], path: str
) -> None:
    edge.pipeline.max_steps = 20
    connection = await connect(edge)
    connection.post(path, {**base, **body})
    answer = await connection.response()
    assert answer.status < 500
    if answer.status != 200:
        assert answer.error()["message"]
    connection.writer.close()


def _parse_or_refuse(
    parse: Callable[[bytes, str], ParsedRequest], data: bytes
) -> ParsedRequest | None:
    try:
        return parse(data, "req-1")
    except InvalidArgument as error:
        error_body(problem_of(error))
        return None


def _check(parsed: ParsedRequest | None) -> None:
    """What the pipeline may rely on."""
    if parsed is None:
        return
    request = parsed.generation
    given = (request.prompt, request.messages, request.token_ids)
    assert sum(value is not None for value in given) == 1
    assert request.model
    assert 1 <= request.n <= 16
    sampling = request.sampling.validate()
    assert 0 <= sampling.top_k < 1 << 32
    assert sampling.max_tokens is None or sampling.max_tokens < 1 << 32
    assert all(0 <= token < 1 << 32 for token in (request.token_ids or ()))
    # All text can be encoded: it goes into protobuf strings.
    request.model.encode()
    for text in (request.prompt or "", *request.stop, *(m.content for m in request.messages or ())):
        text.encode()
