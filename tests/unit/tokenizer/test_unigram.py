"""Unigram on small vocabularies: ties, unknown characters, bytes, as `tokenizers` has them."""

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
from services.tokenizer.backends.unigram import Unigram

#: Many paths have equal sums, and sums that rounding alone tells apart.
VOCAB = [
    ("<unk>", 0.0), ("▁", -2.1), ("a", -1.1), ("aa", -2.2), ("aaa", -3.3000000000000003),
    ("▁a", -3.2), ("b", -1.3), ("ab", -2.4), ("ba", -2.4000000000000004), (".", -1.7),
    ("..", -3.4), ("...", -5.1), ("▁b", -3.1), ("中文", -4.0), ("中", -2.5), ("b文", -3.0),
]  # fmt: skip
BYTES = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
TEXT = st.text("ab. \n\t中文é☃\u0301\u3000▁<unk>", max_size=60)

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
SPACES = normalizers.Sequence(
    [normalizers.Replace("\n", " "), normalizers.Replace("\t", " "),
     normalizers.Replace("\u3000", " "), normalizers.Replace("  ", " "),
     normalizers.Replace("  ", " "), normalizers.Replace("  ", " "),
     normalizers.Replace("  ", " "), normalizers.Replace("  ", " "),
     normalizers.Replace("  ", " ")]
)  # fmt: skip


def spec_of(vocab: list[tuple[str, float]], **fields: object) -> TokenizerSpec:
    tokens = [token for token, _ in vocab]
    spec = TokenizerSpec("test", "unigram", tokens, unk_id=0, fuse_unk=True)
    return replace(spec, scores=[score for _, score in vocab], **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("local", [False, True])
@settings(max_examples=400, deadline=None)
@given(text=TEXT)
def test_words_have_the_ids_of_tokenizers(byte_fallback: bool, local: bool, text: str) -> None:
    vocab = VOCAB + BYTES * byte_fallback
    oracle = Tokenizer(models.Unigram(vocab, 0, byte_fallback))
    oracle.normalizer = SPACES
    oracle.pre_tokenizer = pre_tokenizers.Metaspace()
    spec = spec_of(
        vocab,
        byte_fallback=byte_fallback,
        normalizer=SPACES.normalize_str,
        pre_tokenizer=from_components([METASPACE], "test"),
        prepend_space="always",
        has_local_chunks=local,
    )
    ids = unpack_tokens(Unigram(spec).encode(text))
    assert ids == oracle.encode(text, add_special_tokens=False).ids


def test_a_unit_is_not_looked_for_in_another_place_if_its_paths_are_near() -> None:
    """The same letters have other ids behind others: sums are rounded from the start."""
    oracle = Tokenizer(models.Unigram(VOCAB, 0, False))
    oracle.pre_tokenizer = pre_tokenizers.Metaspace()
    spec = spec_of(
        VOCAB, pre_tokenizer=from_components([METASPACE], "test"), prepend_space="always"
    )
    backend = Unigram(spec)
    for length in range(1, 40):
        for text in ("a" * length, "." * length + "a" * length, "b." * 3 + "a" * length):
            assert unpack_tokens(backend.encode(text)) == oracle.encode(text).ids


def test_100_000_characters_without_a_space() -> None:
    oracle = Tokenizer(models.Unigram(VOCAB, 0, False))
    oracle.pre_tokenizer = pre_tokenizers.Metaspace()
    spec = spec_of(
        VOCAB, pre_tokenizer=from_components([METASPACE], "test"), prepend_space="always"
    )
    text = "abé中a." * 16_000
    assert unpack_tokens(Unigram(spec).encode(text)) == oracle.encode(text).ids


def test_scores_must_be_there() -> None:
    with pytest.raises(StartupError, match="scores"):
        Unigram(TokenizerSpec("test", "unigram", ["a"], unk_id=0))
