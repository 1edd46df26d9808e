"""Chat templates against `transformers`' apply_chat_template: the same text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from headrace.blocks import unpack_tokens
from headrace.errors import InvalidArgument
from headrace.models.files import ModelFiles
from services.tokenizer.backends import read_spec
from services.tokenizer.service import Tokenizer, TokenizerService
from services.tokenizer.templates import ChatTemplate
from services.tokenizer.work import EncodeChat, Encoded, Limits, Message
from tests.parity.tokenizer_parts import oracle_of

NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}

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
}
CHAT = [Message("system", "  Béa\n"), Message("user", "a < b & 'c'"), Message("assistant", "ok")]


@pytest.fixture(scope="module")
def reference(smollm2: ModelFiles) -> PreTrainedTokenizerFast:
    spec = read_spec(smollm2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=oracle_of(spec), **NAMED)
    tokenizer.chat_template = spec.chat_template
    return tokenizer


@pytest.fixture(scope="module")
def service(smollm2: ModelFiles) -> TokenizerService:
    return TokenizerService({"m": Tokenizer(smollm2)}, Limits())


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


@pytest.mark.parametrize("add_prompt", [False, True])
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_feature_renders_alike(
    reference: PreTrainedTokenizerFast, source: str, add_prompt: bool
) -> None:
    expected = reference.apply_chat_template(
        as_dicts(CHAT), chat_template=source, tokenize=False, add_generation_prompt=add_prompt
    )
    ours = ChatTemplate("m", source, NAMED)
    assert ours.render(CHAT, add_generation_prompt=add_prompt, max_len=10_000) == expected


TURN = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant", "tool", ""]),
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["<|im_end|>\n", "{{ x }}"]),
)


@settings(max_examples=200, deadline=None)
@given(messages=st.lists(TURN, min_size=1, max_size=5), add_prompt=st.booleans())
def test_smollm2_chats_become_the_same_ids(
    reference: PreTrainedTokenizerFast,
    service: TokenizerService,
    messages: list[Message],
    add_prompt: bool,
) -> None:
    expected = reference.apply_chat_template(
        as_dicts(messages), add_generation_prompt=add_prompt, return_dict=False
    )
    answer = service.do(EncodeChat("m", messages, add_prompt))
    assert isinstance(answer, Encoded)
    assert unpack_tokens(answer.token_ids) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "broken"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages.append(1) }}", "unsafe|not safe|append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0] + 1 }}", "TypeError"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "more than 10,000 characters"),
    ],
)
def test_a_template_fails_its_request_with_its_own_words(source: str, message: str) -> None:
    template = ChatTemplate("m", source, NAMED)
    with pytest.raises(InvalidArgument, match=message) as caught:
        template.render(CHAT, add_generation_prompt=True, max_len=10_000, max_seconds=0.2)
    assert caught.value.field == "messages"


@pytest.mark.timeout(60, method="thread")
def test_a_template_that_does_not_end_fails_its_request() -> None:
    """pytest's usual timeout is the same signal, and would hide that ours is missing."""
    loop = "{% for i in range(99999) %}"
    template = ChatTemplate("m", loop * 3 + "{% endfor %}" * 3, NAMED)
    with pytest.raises(InvalidArgument, match=r"took more than 0\.2 s"):
        template.render(CHAT, add_generation_prompt=True, max_len=10_000, max_seconds=0.2)
