"""How token ids become text, rule by rule. tests/parity has the real vocabularies."""

from __future__ import annotations

import pytest

from services.tokenizer.backends.base import AddedToken, TokenizerSpec
from services.tokenizer.backends.token_texts import (
    TokenTexts,
    byte_level_texts,
    sentencepiece_texts,
    wordpiece_texts,
)


def spec_of(family: str, tokens: list[str], **values: object) -> TokenizerSpec:
    added = [AddedToken(at, t, True) for at, t in enumerate(tokens) if t.startswith("<|")]
    return TokenizerSpec("test", family, tokens, **{"added": added, **values})  # type: ignore[arg-type]


def shown(texts: TokenTexts, *ids: int, skip_special: bool = False) -> str:
    return texts.decode(ids, skip_special=skip_special)


def test_byte_level_letters_are_bytes() -> None:
    tokens = ["Ġa", "ðŁĺ", "Ģ", "Ċ", "", "<|end|>", "中"]
    texts = byte_level_texts(spec_of("byte_level_bpe", tokens))
    assert shown(texts, 0, 1, 2, 3, 4) == " a😀\n"
    assert shown(texts, 1, 0) == "\N{REPLACEMENT CHARACTER} a"
    assert shown(texts, 0, 5, 0) == " a<|end|> a"
    assert shown(texts, 0, 5, 0, skip_special=True) == " a a"
    assert shown(texts, 6) == "中"
    assert shown(texts, 0, 7, 1000) == " a"


def test_an_added_byte_level_token_is_its_content() -> None:
    added = [AddedToken(0, "õ", False), AddedToken(1, "a b", False)]
    texts = byte_level_texts(spec_of("byte_level_bpe", ["õ", "a b", "õ"], added=added))
    assert [shown(texts, at) for at in range(3)] == ["õ", "a b", "\N{REPLACEMENT CHARACTER}"]


def test_sentencepiece_spaces_and_bytes() -> None:
    tokens = ["▁a", "<0xE2>", "<0x82>", "<0xac>", "<0x41>", "b▁c", "<0xZZ>", "<|s|>", "▁"]
    spec = spec_of("sentencepiece_bpe", tokens, byte_fallback=True, strips_first_space=True)
    texts = sentencepiece_texts(spec)
    assert shown(texts, 0, 5, 6) == "ab c<0xZZ>"
    assert shown(texts, 1, 2, 3) == "€"
    assert shown(texts, 1, 2, 4) == "\N{REPLACEMENT CHARACTER}" * 2 + "A"
    assert shown(texts, 1, 2) == "\N{REPLACEMENT CHARACTER}" * 2
    assert shown(texts, 7, 0) == "<|s|> a"
    assert shown(texts, 7, 0, skip_special=True) == "a"
    assert shown(texts, 8, 0) == " a"


def test_without_byte_fallback_a_byte_s_name_is_text() -> None:
    texts = sentencepiece_texts(spec_of("unigram", ["▁a", "<0x41>"]))
    assert shown(texts, 0, 1) == " a<0x41>"


@pytest.mark.parametrize(
    ("ids", "cleaned", "plain"),
    [
        ([0, 1, 2], "hellos!", "hellos !"),
        ([1, 0], "##s hello", "##s hello"),
        ([0, 3, 4, 5], "hello don ' t", "hello don ' t"),
        ([2, 2], "!!", "! !"),
        ([0, 6, 0], "hello<|sep|> hello", "hello <|sep|> hello"),
    ],
)
def test_wordpiece_words_and_punctuation(ids: list[int], cleaned: str, plain: str) -> None:
    tokens = ["hello", "##s", "!", "don", "'", "t", "<|sep|>", ""]
    spec = spec_of("wordpiece", tokens)
    cleaned = cleaned.replace("<|", " <|")
    assert shown(wordpiece_texts(spec), *ids) == cleaned
    assert shown(wordpiece_texts(spec_of("wordpiece", tokens, cleans_up=False)), *ids) == plain
    assert shown(wordpiece_texts(spec), 7, 6, 0, skip_special=True) == "hello"


def test_a_wordpiece_contraction_loses_its_space() -> None:
    texts = wordpiece_texts(spec_of("wordpiece", ["it", "'s", "do", "n't"]))
    assert shown(texts, 0, 1, 2, 3) == "it's don't"
