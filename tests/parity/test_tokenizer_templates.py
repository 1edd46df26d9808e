"""Chat templates against `transformers`' apply_chat_template: the same text."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from headrace.models.files import ModelFiles
from services.tokenizer.backends import read_spec
from services.tokenizer.sandbox import RenderLimits
from services.tokenizer.templates import ChatTemplate
from services.tokenizer.work import Chat, Message
from tests.vocabularies import folder

NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
LIMITS = RenderLimits(max_len=1_000_000)

#: One feature of templates each, as models' own use them.
TEMPLATES = {
    "blocks are trimmed": """
{%- for m in messages %}
    {% if m.role == 'user' %}
  [{{ m.content | trim }}]
    {%- else -%}
  ({{ m['content'] }})
    {% endif %}
{% endfor %}
end""",
    "json": "{{ messages | tojson(indent=2) }}{{ {'é<': [1, none, true]} | tojson }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content|length %}{% endfor %}{{ ns.n }}",
    "tokens": "{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}{{ unk_token }}",
    "absent": "{% if tools %}t{% endif %}{% if documents is none %}d{% endif %}"
    "{% if enable_thinking is defined %}e{% endif %}{{ strftime_now('%Y-%m') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "methods": "{{ messages[0].content.split('a')[0].upper() }}{{ messages[0].keys()|list }}",
    "prompt": "{% if add_generation_prompt %}<go>{% else %}<stop>{% endif %}",
    "arithmetic": "{{ 7 * 6 }} {{ '-' * 5 }} {{ 2 ** 10 }} {{ 17 % 5 }} {{ '%s:%05d' % ('a', 7) }}",
    "texts": "{{ [1, 'b', 3]|join(', ') }} {{ 'aXa'|replace('X', '--') }} {{ 'a'|center(5) }}|"
    "{{ messages|map(attribute='role')|join('/') }} {{ 'é\n.'|indent(3) }} {{ 'ab'.ljust(4) }}|"
    "{{ messages|join(' ', attribute='role') }} {{ [1,2,3]|batch(2, 'x')|list }}",
    "macros": "{% macro f(m) -%}<{{ m.role ~ m.content }}>{%- endmacro %}"
    "{% set all %}{% for m in messages %}{{ f(m) }}{% endfor %}{% endset %}{{ all|upper }}",
    "loops": "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}{{ loop.last }}"
    "{% else %}none{% endfor %}{% for i in range(3) %}{{ loop.previtem }}{% endfor %}",
}
CHAT = [
    {"role": "system", "content": "  Béa\n"},
    {"role": "user", "content": "a < b & 'c'"},
    {"role": "assistant", "content": "ok"},
]

REAL = ("smollm2-135m", "qwen3", "llama3", "llama3_1", "deepseek_v3", "gemma3")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_river",
            "description": "Finds a river & its <length>.",
            "parameters": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "description": "Név"},
                    "unit": {"type": "string", "enum": ["km", "mi"]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["name"],
            },
        },
    }
]
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "find_river", "arguments": {"name": "Tisza", "unit": "km"}},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": CHAT[:2],
    "turns": [*CHAT, {"role": "user", "content": "and 中文?"}],
    "no system": [{"role": "user", "content": "hi"}],
    "call": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How long is the Tisza?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "find_river", "content": "966"},
    ],
    "answered": [
        {"role": "user", "content": "How long?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "find_river", "content": "966"},
        {"role": "assistant", "content": "966 km"},
        {"role": "user", "content": "Thanks"},
    ],
    "thinking": [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2", "reasoning_content": "add them"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>\nsum\n</think>\n\n4"},
        {"role": "user", "content": "3+3"},
    ],
    "other name of thinking": [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2", "reasoning": "add them"},
    ],
    "parts": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "2"}],
        }
    ],
    "developer": [{"role": "developer", "content": "Rules"}, {"role": "user", "content": "hi"}],
}
ARGS: dict[str, dict[str, Any]] = {
    "none": {},
    "thinking off": {"enable_thinking": False, "thinking": False},
    "thinking on": {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
    "documents": {"documents": [{"title": "T", "text": "body"}]},
    "date": {"date_string": "1 Jan 2025", "tools_in_user_message": False},
}


def source_of(model: str, smollm2: ModelFiles) -> tuple[str, dict[str, str]]:
    """The template of a model's files, and the tokens that they name."""
    if model == "smollm2-135m":
        spec = read_spec(smollm2)
        assert spec.chat_template is not None
        return spec.chat_template, dict(spec.named_tokens)
    config = json.loads((folder(model) / "tokenizer_config.json").read_bytes())
    named = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        value = value["content"] if isinstance(value, dict) else value
        if value is not None:
            named[name] = value
    return config["chat_template"], named


def chat_of(
    messages: list[dict[str, Any]], add_prompt: bool, tools: Any = None, args: Any = None
) -> Chat:
    return Chat(
        [Message("", "", json.dumps(message).encode()) for message in messages],
        add_prompt,
        json.dumps(tools).encode() if tools else b"",
        json.dumps(args).encode() if args else b"",
    )


def expected_of(
    source: str,
    named: dict[str, str],
    messages: list[dict[str, Any]],
    add_prompt: bool,
    tools: Any = None,
    args: Any = None,
) -> str:
    """What `transformers` makes; its error's text if it fails."""
    try:
        rendered, _ = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=add_prompt,
            **{**named, **(args or {})},
        )
    except Exception as error:  # noqa: BLE001 - whatever a template raises
        return f"failed: {error}"
    return str(rendered[0])


def rendered_by(template: ChatTemplate, chat: Chat) -> str:
    try:
        return template.render(chat, LIMITS)
    except Exception as error:  # noqa: BLE001 - compared
        return f"failed: {re.sub(r'^.*refused the messages: (TypeError: )?', '', str(error))}"


@pytest.mark.parametrize("add_prompt", [False, True])
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_feature_renders_alike(source: str, add_prompt: bool) -> None:
    ours = ChatTemplate("m", source, NAMED)
    expected = expected_of(source, NAMED, CHAT, add_prompt)
    assert not expected.startswith("failed")
    assert ours.render(chat_of(CHAT, add_prompt), LIMITS) == expected


@pytest.mark.parametrize("model", REAL)
def test_a_models_own_template_renders_alike(model: str, smollm2: ModelFiles) -> None:
    source, named = source_of(model, smollm2)
    ours = ChatTemplate(model, source, named)
    num_rendered = 0
    for messages in CHATS.values():
        for args in ARGS.values():
            for tools in (None, TOOLS):
                expected = expected_of(source, named, messages, True, tools, args)
                chat = chat_of(messages, True, tools, args)
                assert rendered_by(ours, chat) == expected
                num_rendered += not expected.startswith("failed")
    assert num_rendered >= 20


TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", ""]),
        "content": st.text(st.characters(exclude_categories=["Cs"]))
        | st.sampled_from(["<|im_end|>\n", "{{ x }}", "<think>a</think>b"]),
    }
)


@settings(max_examples=100, deadline=None)
@given(messages=st.lists(TURN, min_size=1, max_size=5), add_prompt=st.booleans())
@pytest.mark.parametrize("model", ["smollm2-135m", "qwen3"])
def test_random_chats_render_alike(
    smollm2: ModelFiles, model: str, messages: list[dict[str, str]], add_prompt: bool
) -> None:
    if model not in _compiled:
        source, named = source_of(model, smollm2)
        _compiled[model] = source, named, ChatTemplate(model, source, named)
    source, named, ours = _compiled[model]
    plain = Chat([Message(m["role"], m["content"]) for m in messages], add_prompt)
    expected = expected_of(source, named, messages, add_prompt)
    assert rendered_by(ours, plain) == expected
    assert rendered_by(ours, chat_of(messages, add_prompt)) == expected


_compiled: dict[str, tuple[str, dict[str, str], ChatTemplate]] = {}
