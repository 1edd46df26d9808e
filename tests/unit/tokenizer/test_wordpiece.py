"""WordPiece on a small vocabulary, as `tokenizers` has it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from headrace.blocks import unpack_tokens
from headrace.errors import StartupError
from services.tokenizer.backends.base import TokenizerSpec
from services.tokenizer.backends.pre_tokenizers import from_components
from services.tokenizer.backends.wordpiece import WordPiece

TOKENS = [
    "[UNK]",
    "a",
    "b",
    "ab",
    "##a",
    "##b",
    "##ab",
    "##",
    ".",
    "中",
    "é",
    "##e",
    "##s",
    "σ",
    "A",
]
SPECIAL_SPACES = "\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000\u200b\ufeff"


def spec_of(**fields: object) -> TokenizerSpec:
    spec = TokenizerSpec(
        "test", "wordpiece", TOKENS, unk_id=0, max_word_len=12,
        pre_tokenizer=from_components([{"type": "BertPreTokenizer"}], "test"),
    )  # fmt: skip
    return replace(spec, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("lowercase", [False, True])
@settings(max_examples=400, deadline=None)
@given(text=st.text(f"aabbAB. \n\r\t中éÉΣ\u0301#\0{SPECIAL_SPACES}", max_size=60))
def test_ids_are_those_of_tokenizers(local: bool, lowercase: bool, text: str) -> None:
    vocab = {token: at for at, token in enumerate(TOKENS)}
    oracle = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=12))
    oracle.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    oracle.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    spec = spec_of(normalizer=oracle.normalizer.normalize_str, has_local_chunks=local)
    ids = unpack_tokens(WordPiece(spec).encode(text))
    assert ids == oracle.encode(text, add_special_tokens=False).ids


def test_a_word_that_is_too_long_is_unknown() -> None:
    backend = WordPiece(spec_of())
    assert unpack_tokens(backend.encode("a" * 12)) == [1, *[4] * 11]
    assert unpack_tokens(backend.encode("a" * 13)) == [0]
    assert unpack_tokens(backend.encode("a" * 100_000)) == [0]


def test_the_unknown_token_must_be_there() -> None:
    with pytest.raises(StartupError, match="unknown token"):
        WordPiece(spec_of(unk_id=None))
