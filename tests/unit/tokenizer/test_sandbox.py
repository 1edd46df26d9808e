"""Templates that misbehave fail their request, with clear words and within their limits."""

from __future__ import annotations

import resource
import signal
import time
from contextlib import suppress

import pytest

from headrace.errors import InvalidArgument
from services.tokenizer.sandbox import RenderLimits
from services.tokenizer.templates import ChatTemplate
from services.tokenizer.work import Chat, Message

CHAT = Chat([Message("system", "S"), Message("user", "a < b"), Message("assistant", "ok")], True)
LIMITS = RenderLimits(max_len=10_000, seconds=0.5, max_turns=2000)
DOUBLED = (
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = DOUBLE %}{% endfor %}"
)


def render(source: str, limits: RenderLimits = LIMITS) -> str:
    return ChatTemplate("m", source, {}).render(CHAT, limits)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "broken, line 1"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages.append(1) }}", "unsafe|not safe|append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "no attribute '__class__'"),
        ("{% set n = namespace() %}{% set n.__init__ = 1 %}", "no attribute|unsafe|broken"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0] + 1 }}", "TypeError"),
        ("{{ '\\ud800' }}", "half a character"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        # Output, and what is made on the way.
        ("{% for i in range(99) %}{{ 'x' * 999 }}{% endfor %}", "more than 10,000 characters"),
        ("{{ 'x' * 10**9 }}", "more than 10,000 characters"),
        ("{{ 10**9 * 'x' }}", "more than 10,000 characters"),
        ("{{ [0] * 10**9 }}", "list of 1,000,000,000 elements"),
        ("{{ 'x'.center(10**9) }}", "more than 10,000 characters"),
        ("{{ '%999999999d' % 1 }}", "more than 10,000 characters"),
        ("{{ '%*d' % (999999999, 1) }}", "more than 10,000 characters"),
        ("{{ 'a\\tb'.expandtabs(10**9) }}", "more than 10,000 characters"),
        ("{{ ('x' * 999)|replace('x', 'y' * 999) }}", "more than 10,000 characters"),
        ("{{ ('x' * 999).replace('x', 'y' * 999) }}", "more than 10,000 characters"),
        ("{{ ('x' * 999).join(['y'] * 999) }}", "more than 10,000 characters"),
        ("{{ (['y'] * 999)|join('x' * 999) }}", "more than 10,000 characters"),
        ("{% set x %}{% for i in range(99) %}{{ 'x' * 999 }}{% endfor %}{% endset %}", "10,000"),
        ("{{ 'x'|center(10**9) }}", "gives 1,000,000,000 to center"),
        ("{{ 'x'|indent(10**9) }}", "gives 1,000,000,000 to indent"),
        ("{{ messages|tojson(indent=10**9) }}", "gives 1,000,000,000 to tojson"),
        ("{{ [1]|batch(10**9, 'x')|list }}", "gives 1,000,000,000 to batch"),
        ("{{ 9**999999 }}", "number of more than 4,096 bits"),
        ("{{ 2**4000 * 2**4000 }}", "number of more than 4,096 bits"),
        ("{{ range(10**9)|list }}", "Range too big"),
        (
            DOUBLED.replace("DOUBLE", "[ns.x, ns.x]") + "{{ ns.x|tojson }}",
            "values as JSON|than 0.5 s",
        ),
        # Turns of loops.
        ("{% for i in range(99) %}{% for j in range(99) %}{% endfor %}{% endfor %}", "loops more"),
        ("{% for i in range(9999) recursive %}{% endfor %}", "loops more than 2,000 times"),
        # Memory.
        (DOUBLED.replace("DOUBLE", "ns.x + ns.x"), r"more than (256 MiB|0\.5 s)"),
        (DOUBLED.replace("DOUBLE", "ns.x ~ ns.x"), r"more than (256 MiB|0\.5 s)"),
        ("{{ '{:>999999999}'.format(1) }}", r"more than (256 MiB|0\.5 s)"),
        # Time.
        ("{{ (1, 2)|slice(10**9)|list|length }}", r"more than 0\.5 s"),
        (DOUBLED.replace("DOUBLE", "[ns.x, ns.x]") + "{{ ns.x }}", r"more than 0\.5 s|MiB"),
    ],
)
# The alarm may ring in a destructor, which can only tell of it; then it rings again.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(60, method="thread")
def test_a_template_fails_its_request_with_clear_words(source: str, message: str) -> None:
    """pytest's usual timeout is the same signal, and would hide that ours is missing."""
    started = time.process_time()
    with pytest.raises(InvalidArgument, match=message) as caught:
        render(source)
    assert caught.value.field == "messages"
    assert time.process_time() - started < 20
    assert render("{{ messages[1].content }}") == "a < b"


def test_nothing_is_computed_while_compiling() -> None:
    template = ChatTemplate("m", "{{ 'x'|center(10**9) }}{{ 2|round(10**9) }}", {})
    with pytest.raises(InvalidArgument, match="center"):
        template.render(CHAT, LIMITS)


def test_limits_end_with_the_rendering() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)
    for source in ("{{ bos_token }}ok", "{{ 'x' * 10**9 }}", "{{ '{:>999999999}'.format(1) }}"):
        with suppress(InvalidArgument):
            render(source)
        after = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)
        assert after == before
    assert len("x" * (300 << 20)) == 300 << 20


def test_a_long_chat_is_within_the_limits_of_loops() -> None:
    messages = [Message("user", "x")] * 4096
    source = "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}"
    text = ChatTemplate("m", source, {}).render(Chat(messages), RenderLimits(max_len=1 << 20))
    assert text == "x" * 4096


@pytest.mark.parametrize(
    ("chat", "field", "message"),
    [
        (Chat(CHAT.messages, tools_json=b"{"), "tools", "no JSON"),
        (Chat(CHAT.messages, tools_json=b"{}"), "tools", "no array"),
        (Chat(CHAT.messages, tools_json=b"[1]"), "tools[0]", "no object"),
        (Chat(CHAT.messages, tools_json=b'["\\ud800"]'), "tools", "no JSON"),
        (Chat(CHAT.messages, tools_json=b"[" * 100_000), "tools", "no JSON"),
        (Chat(CHAT.messages, template_args_json=b"[]"), "template_args", "no object"),
        (Chat(CHAT.messages, template_args_json=b'{"tools": 1}'), "template_args", "'tools'"),
        (Chat([Message("", "", b'{"role": ')]), "messages[0]", "no JSON"),
        (Chat([*CHAT.messages, Message("", "", b"3")]), "messages[3]", "no object"),
    ],
)
def test_fields_that_are_no_json_are_named(chat: Chat, field: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        ChatTemplate("m", "{{ tools }}", {}).render(chat, LIMITS)
    assert caught.value.field == field


def test_arguments_tools_and_whole_messages_reach_the_template() -> None:
    chat = Chat(
        [Message("", "", b'{"role": "user", "content": [{"text": "a"}], "name": "n"}')],
        True,
        b'[{"type": "function"}]',
        b'{"enable_thinking": false, "bos_token": "<b>", "documents": [{"title": "t"}]}',
    )
    source = (
        "{{ bos_token }}{{ eos_token }}{{ messages[0].name }}{{ messages[0].content[0].text }}"
        "{{ tools[0].type }}{{ enable_thinking }}{{ documents[0].title }}"
        "{{ add_generation_prompt }}"
    )
    template = ChatTemplate("m", source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(chat, LIMITS) == "<b></s>nafunctionFalsetTrue"
