"""WordPiece against `tokenizers` and llama.cpp's vectors: same ids."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.blocks import unpack_tokens
from headrace.models.files import ModelFiles
from services.tokenizer.backends import Backend, load_backend, read_spec
from tests.parity.tokenizer_parts import mixed_text
from tests.vocabularies import folder


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend(read_spec(ModelFiles("minilm", "huggingface", folder("minilm"))))


@pytest.fixture(scope="module")
def oracle() -> Tokenizer:
    oracle = Tokenizer.from_file(str(folder("minilm") / "tokenizer.json"))
    oracle.no_truncation()
    oracle.no_padding()
    return oracle


def ids_by(oracle: Tokenizer, text: str) -> list[int]:
    ids: list[int] = oracle.encode(text, add_special_tokens=False).ids
    return ids


def test_mixed_text(backend: Backend, oracle: Tokenizer) -> None:
    for text in mixed_text(2_000_000):
        assert unpack_tokens(backend.encode(text)) == ids_by(oracle, text)


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_random_unicode(backend: Backend, oracle: Tokenizer, text: str) -> None:
    assert unpack_tokens(backend.encode(text)) == ids_by(oracle, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text("aB é\u0301\u0327中Σς\n\t\x0b\x1c\x85\xa0\u200b[MASK].'", max_size=60))
def test_text_that_is_hard_to_cut(backend: Backend, oracle: Tokenizer, text: str) -> None:
    assert unpack_tokens(backend.encode(text)) == ids_by(oracle, text)


@pytest.mark.parametrize("text", ["a" * 100_000, "中" * 30_000, "." * 100_000, "é\u0301" * 40_000])
def test_100_000_characters_in_a_row(backend: Backend, oracle: Tokenizer, text: str) -> None:
    assert unpack_tokens(backend.encode(text)) == ids_by(oracle, text)


def test_vectors_of_llama_cpp() -> None:
    path = folder("llama-cpp") / "bert-bge.gguf"
    backend = load_backend(read_spec(ModelFiles("bert-bge", "gguf", path)))
    inputs = path.with_suffix(".gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    outputs = path.with_suffix(".gguf.out").read_text().splitlines()
    assert len(outputs) > 40
    for text, line in zip(inputs, outputs, strict=False):
        assert unpack_tokens(backend.encode(text)) == [int(i) for i in line.split()], repr(text)
