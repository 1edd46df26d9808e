"""Real conversations, turn by turn, through the prefix cache: the ids of a full encode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.blocks import block_ids, namespace_key
from headrace.models.files import ModelFiles
from services.tokenizer.service import TokenizerService
from services.tokenizer.tokenizer import Tokenizer
from services.tokenizer.work import (
    Chat,
    EncodeChat,
    Encoded,
    EncodeOptions,
    Limits,
    Message,
    Render,
    Rendered,
)
from tests.vocabularies import folder

SESSIONS = Path(__file__).resolve().parents[1] / "data" / "agent_sessions.jsonl"
KEY = namespace_key("test")
OPTIONS = EncodeOptions(KEY, 16)
MODELS = ("smollm2-135m", "qwen3", "llama3_1", "deepseek_v3")


def turns() -> Iterator[Chat]:
    """Every turn of every session; the sessions take turns."""
    sessions = [json.loads(line)["messages"] for line in SESSIONS.read_text().splitlines()]
    for end in range(1, max(map(len, sessions)) + 1):
        for session in sessions:
            if end <= len(session) and session[end - 1]["role"] == "user":
                messages = [Message(m["role"], m["content"]) for m in session[:end]]
                yield Chat(messages, add_generation_prompt=True)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cache_bytes", [1 << 24, 50_000], ids=["roomy", "too small"])
def test_every_turn_has_the_ids_of_a_full_encode(
    smollm2: ModelFiles, model: str, cache_bytes: int
) -> None:
    files = smollm2 if model == smollm2.name else ModelFiles(model, "safetensors", folder(model))
    tokenizer = Tokenizer(files)
    encode, num_encoded, num_chars = tokenizer.backend.encode, 0, 0

    def counted(text: str, *, parse_added: bool = True) -> bytes:
        nonlocal num_encoded
        num_encoded += len(text)
        return encode(text, parse_added=parse_added)

    tokenizer.backend.encode = counted  # type: ignore[method-assign]
    service = TokenizerService({model: tokenizer}, Limits(prefix_cache_bytes=cache_bytes))
    for chat in turns():
        answer = service.do(EncodeChat(model, chat, OPTIONS))
        rendered = service.do(Render(model, chat))
        assert isinstance(answer, Encoded)
        assert isinstance(rendered, Rendered)
        assert answer.token_ids == encode(rendered.text)
        assert answer.block_ids == b"".join(block_ids(answer.token_ids, 16, KEY))
        num_chars += len(rendered.text)
    if cache_bytes > 1 << 20:
        assert num_encoded < num_chars / 3
