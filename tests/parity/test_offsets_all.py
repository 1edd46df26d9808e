"""Offsets against Hugging Face's `tokenizers`, on text of all kinds."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.tokenizer.backends.offsets import OffsetFinder
from tests.parity.plain_specs import oracle_of, spec_of, texts_of
from tests.parity.tokenizer_parts import mixed_text

#: Without a normalizer, or with one that makes no character of several.
EQUAL = ("llama3", "deepseek_v3", "gptoss", "whisper", "gemma3", "llama2", "minilm")
#: NFC; SentencePiece's charsmap: a character that is made of several covers them all
#: here, and only some there.
WIDER = ("qwen3", "e5")

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@cache
def finder_of(name: str) -> OffsetFinder:
    return OffsetFinder(spec_of(name), texts_of(name))


def assert_same(name: str, text: str) -> int:
    """Returns how many tokens are wider than there."""
    normalize = spec_of(name).normalizer
    if name in WIDER and normalize is not None:
        # Behind a character that is taken out, those there are one off.
        text = "".join(char for char in text if normalize(char))
    expected = oracle_of(name).encode(text, add_special_tokens=False)
    found = finder_of(name).find(text, expected.ids)
    if name in EQUAL:
        assert found == expected.offsets
        return 0
    wider = 0
    for index, (ours, theirs) in enumerate(zip(found, expected.offsets, strict=True)):
        assert ours[0] <= theirs[0] <= theirs[1] <= ours[1], expected.tokens[index]
        wider += ours != theirs
    return wider


@pytest.mark.parametrize("name", [*EQUAL, *WIDER])
def test_offsets_of_mixed_text(name: str) -> None:
    for text in mixed_text(60_000):
        assert_same(name, text[:12_000])


@pytest.mark.parametrize("name", [*EQUAL, *WIDER])
@settings(max_examples=150, deadline=None)
@given(text=TEXT | st.text("aé e\u0301\u0327 \n\t<s>|▁中😀ﬁ\u1100\u1161\u11a8İß.'s", max_size=40))
def test_offsets_of_random_text(name: str, text: str) -> None:
    assert_same(name, text)


@pytest.mark.parametrize("name", WIDER)
def test_nothing_is_wider_without_reason(name: str) -> None:
    assert assert_same(name, "Plain words, 12 of them; größer, 中文 and 😀 too. <s>") == 0
