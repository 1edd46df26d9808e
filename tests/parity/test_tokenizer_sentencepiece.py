"""SentencePiece's families against `tokenizers` and the `sentencepiece` library: same ids."""

from __future__ import annotations

import io
import random
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.blocks import unpack_tokens
from headrace.models.files import ModelFiles
from services.tokenizer.backends import Backend, load_backend, read_spec
from tests.parity.tokenizer_parts import DATA, mixed_text
from tests.vocabularies import folder

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
HARD = st.text("ab \n\t▁>/<é中文\u0301\u3000.019<s>👍\u200d", max_size=60)
ADVERSARIES = ["a" * 100_000, " " * 100_000, "中" * 30_000, "> </" * 25_000, "\n \t" * 30_000]


class Pair:
    """A backend and its oracle, for one tokenizer.json."""

    def __init__(self, name: str) -> None:
        directory = folder(name)
        self.backend: Backend = load_backend(read_spec(ModelFiles(name, "huggingface", directory)))
        self.oracle = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.oracle.no_truncation()
        self.oracle.no_padding()

    def check(self, text: str) -> None:
        expected = self.oracle.encode(text, add_special_tokens=False).ids
        assert_same(unpack_tokens(self.backend.encode(text)), expected)


def assert_same(ids: list[int], expected: list[int]) -> None:
    if ids != expected:
        at = next(
            (i for i, pair in enumerate(zip(ids, expected, strict=False)) if len({*pair}) > 1), 0
        )
        pytest.fail(f"at {at}: {ids[at : at + 8]}, expected {expected[at : at + 8]}")


@pytest.fixture(scope="module", params=["llama2", "gemma3", "e5"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def test_mixed_text(pair: Pair) -> None:
    for text in mixed_text(300_000):
        pair.check(text)


@pytest.mark.slow
def test_more_mixed_text(pair: Pair) -> None:
    for text in mixed_text(4_000_000, seed=8):
        pair.check(text)


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_random_unicode(pair: Pair, text: str) -> None:
    pair.check(text)


@settings(max_examples=300, deadline=None)
@given(text=HARD)
def test_text_that_is_hard_to_cut(pair: Pair, text: str) -> None:
    pair.check(text)


@pytest.mark.parametrize("text", ADVERSARIES, ids=["letters", "spaces", "han", "tags", "blank"])
def test_100_000_characters_in_a_row(pair: Pair, text: str) -> None:
    pair.check(text)


def test_a_long_word_of_random_letters(pair: Pair) -> None:
    pair.check("".join(random.Random(2).choices("etaoinshrdlu", k=30_000)))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_character_beside_spaces_and_letters() -> None:
    """Chunks between white space are encoded alone: no character may mind."""
    pair = Pair("e5")
    unassigned = []
    for char in map(chr, range(0x110000)):
        category = unicodedata.category(char)
        if category in ("Cn", "Co"):
            unassigned.append(char)
        elif category != "Cs":
            pair.check(f"a {char} {char}b a{char} {char}{char}\u0301 {char}")
    for start in range(0, len(unassigned), 100):
        pair.check(" ".join(f"{char} a{char}b" for char in unassigned[start : start + 100]))


@pytest.fixture(scope="module", params=["v1", "v3"])
def model(request: pytest.FixtureRequest) -> tuple[Backend, sentencepiece.SentencePieceProcessor]:
    path = folder("mistral") / f"tokenizer.model.{request.param}"
    backend = load_backend(read_spec(ModelFiles("mistral", "huggingface", path)))
    return backend, sentencepiece.SentencePieceProcessor(str(path))


def test_a_sentencepiece_model(
    model: tuple[Backend, sentencepiece.SentencePieceProcessor],
) -> None:
    backend, library = model
    for text in mixed_text(200_000):
        text = text.replace("\0", "")
        assert_same(unpack_tokens(backend.encode(text, parse_added=False)), library.encode(text))


@settings(max_examples=300, deadline=None)
@given(text=HARD)
def test_a_sentencepiece_model_on_hard_text(
    model: tuple[Backend, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    backend, library = model
    assert unpack_tokens(backend.encode(text, parse_added=False)) == library.encode(text)


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_vectors_of_llama_cpp(name: str) -> None:
    path = folder("llama-cpp") / f"{name}.gguf"
    backend = load_backend(read_spec(ModelFiles(name, "gguf", path)))
    inputs = path.with_suffix(".gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    outputs = path.with_suffix(".gguf.out").read_text().splitlines()
    assert len(outputs) > 40
    for text, line in zip(inputs, outputs, strict=False):
        assert unpack_tokens(backend.encode(text)) == [int(i) for i in line.split()], repr(text)


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_a_unigram_model_that_the_library_trained(
    tmp_path: Path, rule: str, byte_fallback: bool
) -> None:
    path = tmp_path / "unigram.model"
    content = io.BytesIO()
    lines = (DATA / "scripts.txt").read_text("utf-8").split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3), model_writer=content, model_type="unigram",
        vocab_size=1500, hard_vocab_limit=False, normalization_rule_name=rule,
        byte_fallback=byte_fallback, character_coverage=0.99, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(content.getvalue())
    backend = load_backend(read_spec(ModelFiles("trained", "huggingface", path)))
    library = sentencepiece.SentencePieceProcessor(str(path))
    for text in [*lines, *mixed_text(60_000)]:
        text = text.replace("\0", "")
        ids = unpack_tokens(backend.encode(text, parse_added=False))
        expected = library.encode(text)
        # The library adds up in float32: of two paths with the same tokens in another
        # order, "a" "aa" or "aa" "a", rounding chooses.
        if sorted(ids) != sorted(expected) or len(text) < 200:
            assert_same(ids, expected)
