"""Ids, words and text against Hugging Face's `tokenizers`: identical, on everything."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.blocks import unpack_tokens
from headrace.errors import StartupError
from headrace.models.files import ModelFiles
from services.tokenizer.backends import Backend, TokenizerSpec, load_backend, read_spec
from services.tokenizer.backends.base import AddedToken
from services.tokenizer.backends.pre_tokenizers import PRE_TOKENIZERS
from tests.parity.tokenizer_parts import mixed_text, oracle_of

#: What a text may be made of to come back from its ids: SmolLM2's vocabulary has no
#: tokens for some control characters, nor for planes 4 to 11.
LOST_BYTES = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2])

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def spec(smollm2: ModelFiles) -> TokenizerSpec:
    return read_spec(smollm2)


@pytest.fixture(scope="module")
def backend(spec: TokenizerSpec) -> Backend:
    return load_backend(spec)


@pytest.fixture(scope="module")
def oracle(spec: TokenizerSpec) -> Tokenizer:
    return oracle_of(spec)


def assert_same(backend: Backend, oracle: Tokenizer, text: str) -> list[int]:
    ids = unpack_tokens(backend.encode(text))
    expected = oracle.encode(text, add_special_tokens=False).ids
    if ids != expected:
        at = next(i for i, pair in enumerate(zip(ids, expected, strict=False)) if len({*pair}) > 1)
        before = backend.texts.decode(ids[max(0, at - 8) : at], skip_special=False)
        pytest.fail(f"after {before!r}: {ids[at : at + 8]}, expected {expected[at : at + 8]}")
    return ids


def test_ids_of_mixed_text(backend: Backend, oracle: Tokenizer) -> None:
    length = 0
    for text in mixed_text(2_200_000):
        length += len(text.encode())
        ids = assert_same(backend, oracle, text)
        expected = bytes(b for b in text.encode() if b not in LOST_BYTES)
        if expected == text.encode():
            assert backend.texts.decode(ids, skip_special=False) == text
    assert length > 2_000_000


@settings(max_examples=600, deadline=None)
@given(text=TEXT)
def test_ids_of_random_unicode(backend: Backend, oracle: Tokenizer, text: str) -> None:
    ids = assert_same(backend, oracle, text)
    if not any(byte in LOST_BYTES for byte in text.encode()):
        assert backend.texts.decode(ids, skip_special=False) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab '\n\trve1²<|im_start|>٣\u3000é👍", max_size=60))
def test_ids_of_text_that_is_hard_to_cut(backend: Backend, oracle: Tokenizer, text: str) -> None:
    assert_same(backend, oracle, text)


@pytest.mark.parametrize(
    "word",
    ["a" * 100_000, " " * 100_000, "=" * 100_000, "é" * 50_000, "中" * 34_000, "\n \t" * 33_000],
    ids=["letters", "spaces", "signs", "accents", "han", "white space"],
)
def test_ids_of_a_word_of_100_000_bytes(backend: Backend, oracle: Tokenizer, word: str) -> None:
    assert_same(backend, oracle, word)
    assert_same(backend, oracle, f"before {word} behind")


def test_ids_of_a_long_word_of_random_letters(backend: Backend, oracle: Tokenizer) -> None:
    assert_same(backend, oracle, "".join(random.Random(2).choices("etaoinshrdlu", k=100_000)))


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_text_of_random_ids(
    backend: Backend, oracle: Tokenizer, ids: list[int], skip: bool
) -> None:
    expected = oracle.decode(ids, skip_special_tokens=skip)
    assert backend.texts.decode(ids, skip_special=skip) == expected


def test_a_tokenizer_json_gives_the_same_ids(
    spec: TokenizerSpec, oracle: Tokenizer, tmp_path: Path
) -> None:
    oracle.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": "{{ messages }}"})
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    read = read_spec(ModelFiles("copy", "huggingface", tmp_path))
    assert list(read.tokens) == list(spec.tokens)
    assert list(read.merges) == list(spec.merges)
    assert read.added == spec.added
    assert read.pre_tokenizer is PRE_TOKENIZERS["smollm"]
    assert read.eos_token_ids == (2, 0)
    assert read.named_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert read.chat_template == "{{ messages }}"


SMALL = TokenizerSpec(
    source="test",
    family="byte_level_bpe",
    pre_tokenizer=PRE_TOKENIZERS["gpt2"],
    tokens=["a", "b", "c", "ab", "bc", "abc", "abcb", "Ġ", "<s>", "<s>x", "ca", "1", "12"],
    merges=[("b", "c"), ("a", "b"), ("ab", "c"), ("c", "a"), ("1", "2")][:4],
    added=[AddedToken(8, "<s>", True), AddedToken(9, "<s>x", False)],
)


@pytest.mark.parametrize("ignore_merges", [False, True])
@settings(max_examples=200, deadline=None)
@given(text=st.text("abc <s>x12", max_size=30))
def test_ids_of_a_small_vocabulary(ignore_merges: bool, text: str) -> None:
    """Tokens that no merge reaches, bytes without a token, added tokens in each other."""
    small = replace(SMALL, ignore_merges=ignore_merges)
    assert_same(load_backend(small), oracle_of(small), text)


SPLIT = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}


def sequence(*parts: dict[str, object]) -> dict[str, object]:
    digits = {"type": "Digits", "individual_digits": True}
    return {"type": "Sequence", "pretokenizers": [digits, *parts]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"normalizer": {"type": "ByteLevel"}}, "ByteLevel"),
        ({"normalizer": {"type": "NFC", "strange": 1}}, "strange"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "^a"}, "content": ""}}, "\\^a"),
        ({"post_processor": {"type": "Strange"}}, "Strange"),
        ({"padding": {"direction": "Up"}}, "up"),
        ({"decoder": {"type": "Metaspace"}}, "Metaspace"),
        ({"decoder": None}, "decoder"),
        ({"model": {"type": "WordLevel"}}, "WordLevel"),
        ({"model": {"type": "BPE", "dropout": 0.1}}, "dropout"),
        ({"model": {"type": "BPE"}}, "vocab"),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "UnicodeScripts"),
        ({"pre_tokenizer": None}, "decoder"),
        ({"pre_tokenizer": sequence({"type": "Strange"})}, "Strange"),
        ({"pre_tokenizer": sequence({"type": "ByteLevel"})}, "adds a space behind"),
        *(
            ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": pattern}}}, "the pattern .* not")
            for pattern in (
                r"\w",
                "a.",
                "(a)",
                "(?i:b)",
                r"\p{Greek}",
                "a{1,3}+",
                "[[a]]",
                "[a&&b]",
            )
        ),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "a*"}}}, "nothing at all"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "[a&&b]"}}}, "the pattern .* not"),
        ({"pre_tokenizer": {**SPLIT, "behavior": "Odd"}}, "Odd"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_component_that_is_not_known_is_named(
    change: dict[str, object], named: str, tmp_path: Path
) -> None:
    content = json.loads(oracle_of(SMALL).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(StartupError, match=named):
        read_spec(ModelFiles("m", "huggingface", tmp_path))
