"""Tool calls and reasoning out of text: recorded forms, any split, nothing lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import StartupError
from services.gateway.parsers import TOOL_PARSERS, check_told, detect, tool_parser
from services.gateway.parsers.base import MAX_CALL_LEN, Call, Text
from services.gateway.parsers.reasoning import ReasoningSplitter, ends_in_thought

NAMES = ("get_weather", "add")
PARIS = ("get_weather", {"city": "Paris"})

#: Parser, what a model wrote, the text and the calls in it.
RECORDED = [
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [PARIS],
    ),
    (
        "hermes",
        'Let me look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}"}]}}\n'
        "</tool_call>",
        "Let me look.",
        [PARIS, ("add", {"a": 1, "b": [2, {"c": "}"}]})],
    ),
    # The end mark may be cut off, or stand in a string.
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}', "", [("add", {})]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}\n</tool', "", [("add", {})]),
    (
        "hermes",
        '<tool_call>\n{"name": "add", "arguments": {"a": "</tool_call>\\""}}\n</tool_call> done',
        "done",
        [("add", {"a": '</tool_call>"'})],
    ),
    (
        "hermes",
        '<tool_call>\n{"name": "add", "arguments": {"a": "two\nlines"}}\n</tool_call>',
        "",
        [("add", {"a": "two\nlines"})],
    ),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "add", "parameters": {"a": 1}}',
        "",
        [PARIS, ("add", {"a": 1})],
    ),
    ("llama3_json", '\n{"name": "add", "arguments": {}}\n', "", [("add", {})]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "add", "arguments": {"a": "]"}, "id": "abcdefghi"}]',
        "",
        [PARIS, ("add", {"a": "]"})],
    ),
    (
        "mistral",
        'Sure. [TOOL_CALLS][{"name": "add", "arguments": {}}]',
        "Sure.",
        [("add", {})],
    ),
    (
        "mistral_args",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{}',
        "",
        [PARIS, ("add", {})],
    ),
    ("mistral_args", '[TOOL_CALLS]add[ARGS]{"a": 1}', "", [("add", {"a": 1})]),
]

#: What is no call stays as it is.
TEXTS = [
    ("hermes", "Plain <b>text</b> with < and <tool"),
    ("hermes", "<tool_call> is how I call."),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {a: 1}}</tool_call> after'),
    ("llama3_json", "Hello {not} JSON"),
    ("llama3_json", '{"city": "Paris"}'),
    ("llama3_json", '{"name": "unknown", "parameters": {}}'),
    ("llama3_json", '{"name": "add", "parameters": {}'),
    ("llama3_json", '  Then: {"name": "add", "parameters": {}}'),
    ("mistral", "A list [1, 2] and [TOOL"),
    ("mistral", "[TOOL_CALLS] none"),
    ("mistral", '[TOOL_CALLS] [{"name": "unknown", "arguments": {}}]'),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}}, {"name": "no"}] end'),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral_args", "[TOOL_CALLS]add[ARGS]no"),
    ("mistral_args", "[TOOL_CALLS]add[ARG"),
    ("mistral_args", '[TOOL_CALLS]unknown[ARGS]{"a": 1}'),
    ("mistral_args", '[TOOL_CALLS]a b[ARGS]{"a": 1}'),
]


def parse(parser: str, pieces: Sequence[str]) -> tuple[str, list[tuple[str, object]]]:
    made = tool_parser(parser)(NAMES)
    events = [event for piece in pieces for event in made.push(piece)]
    events += made.end()
    text = "".join(event.text for event in events if isinstance(event, Text))
    calls = [(e.name, json.loads(e.arguments)) for e in events if isinstance(e, Call)]
    return text, calls


def split(text: str, cuts: Sequence[int]) -> list[str]:
    at = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(at)]


CUTS = st.lists(st.integers(0, 500), max_size=8)


@pytest.mark.parametrize(("parser", "text", "shown", "calls"), RECORDED)
def test_recorded_forms_whatever_the_split(
    parser: str, text: str, shown: str, calls: list[tuple[str, object]]
) -> None:
    assert parse(parser, [text]) == (shown, calls)
    assert parse(parser, list(text)) == (shown, calls)

    @settings(max_examples=40, deadline=None)
    @given(CUTS)
    def check(cuts: list[int]) -> None:
        assert parse(parser, split(text, cuts)) == (shown, calls)

    check()


@pytest.mark.parametrize(("parser", "text"), TEXTS)
def test_what_is_no_call_stays_text(parser: str, text: str) -> None:
    assert parse(parser, [text]) == (text, [])
    assert parse(parser, list(text)) == (text, [])


PARTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<tool",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[CALL_ID]",
            "add",
            ";",
        ),
        *('{"name": "add", "arguments": {}}', '{"name": "add", "parameters": {"a": "\\"}"}}'),
        *("{", "}", "[", "]", '"', "\\", " ", "\n", "text", "<|python_tag|>", "é"),
    ]
)


@pytest.mark.parametrize("parser", TOOL_PARSERS)
@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PARTS, max_size=12), cuts=CUTS)
def test_any_text_is_read_alike_in_any_split(
    parser: str, parts: list[str], cuts: list[int]
) -> None:
    text = "".join(parts)
    whole = parse(parser, [text])
    assert parse(parser, split(text, cuts)) == whole
    if not whole[1]:
        assert whole[0] == text.replace("<|python_tag|>", "") or whole[0] == text
    else:
        assert set(whole[0]) <= set(text)


@pytest.mark.parametrize("parser", TOOL_PARSERS)
@pytest.mark.parametrize("name", [None, "add"])
def test_an_opening_is_the_beginning_of_a_call(parser: str, name: str | None) -> None:
    opening = tool_parser(parser).opening(name)
    body = {"hermes": '{"a": 1}}\n</tool_call>', "llama3_json": '{"a": 1}}'}.get(parser, '{"a": 1}')
    if parser == "mistral":
        body += "}]"
    if name is None:
        key = {"llama3_json": "parameters"}.get(parser, "arguments")
        body = f'add", "{key}": ' + body if parser != "mistral_args" else "add[ARGS]" + body
    assert parse(parser, [opening, *body]) == ("", [("add", {"a": 1})])


@pytest.mark.parametrize("parser", TOOL_PARSERS)
def test_a_call_without_end_is_bounded(parser: str) -> None:
    text = tool_parser(parser).opening("add") + '{"a": "' + "x" * MAX_CALL_LEN
    made = tool_parser(parser)(NAMES)
    shown = [event for event in made.push(text) if isinstance(event, Text)]
    assert "".join(event.text for event in shown) == text


def test_arguments_can_always_be_encoded() -> None:
    _, calls = parse(
        "hermes", [r'<tool_call>{"name":"add","arguments":{"a":"\ud800"}}</tool_call>']
    )
    assert calls == [("add", {"a": "\ud800"})]
    made = tool_parser("llama3_json")(NAMES)
    (call,) = made.push(r'{"name": "add", "parameters": {"a": "\ud800 é"}}')
    assert isinstance(call, Call)
    call.arguments.encode()


@pytest.mark.parametrize("deep", [200, 100_000])
def test_deep_nesting_is_text_or_a_call(deep: int) -> None:
    text = '<tool_call>{"name":"add","arguments":{"a":' + "[" * deep + "]" * deep + "}}</tool_call>"
    shown, calls = parse("hermes", [text])
    assert bool(calls) != bool(shown)
    assert calls or shown == text


#: Whether the template opened a thought, the answer, the thought, what follows.
THOUGHTS = [
    (False, "<think>\nHm.\n\nYes\n</think>\n\nHello.", "Hm.\n\nYes", "Hello."),
    (True, "\nHm.\n</think>\n\nHello.\n", "Hm.", "Hello.\n"),
    (False, "Hello </think> you", "", "Hello </think> you"),
    (False, " <thin", "", " <thin"),
    (False, "<think></think>x", "", "x"),
    (True, "never ends <b> \n", "never ends <b>", ""),
    (False, "", "", ""),
    (False, "<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
]


@pytest.mark.parametrize(("is_open", "text", "thought", "content"), THOUGHTS)
def test_reasoning(is_open: bool, text: str, thought: str, content: str) -> None:
    def run(pieces: Sequence[str]) -> tuple[str, str]:
        splitter = ReasoningSplitter(is_open=is_open)
        found = [p for piece in pieces for p in splitter.push(piece)] + splitter.end()
        return (
            "".join(p.text for p in found if p.is_reasoning),
            "".join(p.text for p in found if not p.is_reasoning),
        )

    @settings(max_examples=40, deadline=None)
    @given(CUTS)
    def check(cuts: list[int]) -> None:
        assert run(split(text, cuts)) == (thought, content)

    assert run([text]) == run(list(text)) == (thought, content)
    check()


def test_a_format_is_read_from_the_template() -> None:
    assert detect("m", "plain {{ messages }}").tool_parser == ""
    assert detect("m", "within <tool_call></tool_call> tags").tool_parser == "hermes"
    assert detect("m", "'[TOOL_CALLS] ['").tool_parser == "mistral"
    assert detect("m", "[TOOL_CALLS]' + name + '[ARGS]'").tool_parser == "mistral_args"
    llama = '{"name": function name, "parameters": dictionary of argument name and its value}'
    assert detect("m", llama).tool_parser == "llama3_json"
    assert detect("m", "x", ("hermes",)).tool_parser == "hermes"
    assert detect("m", "x", ("other=hermes",)).tool_parser == ""
    check_told(["hermes", "org/m=mistral"])
    with pytest.raises(StartupError, match="MODEL=one, not 'm=no'"):
        check_told(["m=no"])
    assert detect("m", "[TOOL_CALLS]", ("m=llama3_json",)).tool_parser == "llama3_json"
    assert detect("m", "{% if '</think>' in content %}").has_reasoning
    assert ends_in_thought("…<think>\n")
    assert not ends_in_thought("<think>\n\n</think>\n\n")
