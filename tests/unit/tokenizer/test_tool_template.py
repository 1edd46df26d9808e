"""A template of its own for chats with tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.models.files import ModelFiles
from services.tokenizer.backends.sources.parts import chat_templates
from services.tokenizer.service import TokenizerService
from services.tokenizer.templates import ChatTemplate
from services.tokenizer.tokenizer import Tokenizer
from services.tokenizer.work import Chat, Limits, Message, Render, Rendered


def test_it_is_taken_when_tools_are_given(
    smollm2: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(smollm2)
    assert tokenizer.tool_template is tokenizer.template
    assert tokenizer.info("m").chat_template
    service = TokenizerService({"m": tokenizer}, Limits(2000, 3, 500))
    monkeypatch.setattr(tokenizer, "template", ChatTemplate("m", "plain", {}))
    monkeypatch.setattr(
        tokenizer, "tool_template", ChatTemplate("m", "tools: {{ tools | length }}", {})
    )
    chat = Chat([Message("user", "x")])
    assert service.do(Render("m", chat)) == Rendered("plain")
    with_tools = Chat(chat.messages, tools_json=b"[{}, {}]")
    assert service.do(Render("m", with_tools)) == Rendered("tools: 2")


def test_it_is_the_variant_named_tool_use(tmp_path: Path) -> None:
    both = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    expected = {"chat_template": "a", "tool_template": "b"}
    assert chat_templates(tmp_path, {"chat_template": both}) == expected
    assert chat_templates(tmp_path, {"chat_template": "a"}) == {"chat_template": "a"}
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat_templates(tmp_path, {"chat_template": both}) == {"chat_template": "file"}
