"""SentencePiece BPE on small vocabularies: against the same done slowly, and by `tokenizers`."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from headrace.blocks import unpack_tokens
from services.tokenizer.backends.base import TokenizerSpec
from services.tokenizer.backends.boundaries import Boundaries
from services.tokenizer.backends.score_merges import ScoreMerges
from services.tokenizer.backends.sentencepiece_bpe import SentencePieceBpe

MERGED = ["▁a", "ab", "▁ab", "▁▁", "b.", "..", "中文", "é1", "a▁b", "▁▁▁", "b▁", "<a", "<ab", "12"]
MERGES = [
    ("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁"), (".", "."), ("中", "文"), ("é", "1"),
    ("▁▁", "▁"), ("▁", "▁▁"), ("▁", "ab"),
]  # fmt: skip
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
#: Some characters are no tokens: c, é, ☃.
SINGLES = list("ab.▁12中文<\n")
TEXT = st.text("ab.▁12中文é<\nc☃x", max_size=90)


def spec_of(tokens: list[str], **fields: object) -> TokenizerSpec:
    spec = TokenizerSpec("test", "sentencepiece_bpe", tokens)
    return replace(spec, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("fallback", ["none", "some", "all"])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("ignore_merges", [False, True])
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_merges_give_the_ids_of_tokenizers(
    fallback: str, fuse: bool, ignore_merges: bool, text: str
) -> None:
    of_bytes = {"none": [], "some": BYTES[60:100], "all": BYTES}[fallback]
    merges = [pair for pair in MERGES if "é" not in pair[0]]
    tokens = ["<unk>", *of_bytes, *SINGLES, *[t for t in MERGED if "é" not in t]]
    options = {"fuse_unk": fuse, "byte_fallback": fallback != "none"}
    spec = spec_of(tokens, unk_id=0, merges=merges, ignore_merges=ignore_merges, **options)
    vocab = {token: at for at, token in enumerate(tokens)}
    oracle = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", ignore_merges=ignore_merges, **options)
    )
    ids = unpack_tokens(SentencePieceBpe(spec).encode(text))
    assert ids == oracle.encode(text, add_special_tokens=False).ids


@settings(max_examples=400, deadline=None)
@given(text=TEXT, scores=st.lists(st.sampled_from([-1.0, -2.0, -3.5, -1e9]), min_size=14))
def test_scores_give_what_the_definition_gives(text: str, scores: list[float]) -> None:
    """With equal scores, and characters that are no tokens but parts of some."""
    tokens = ["<unk>", *BYTES, *SINGLES, *MERGED]
    ranks = [0.0] * (len(tokens) - len(MERGED)) + [-score for score in scores[: len(MERGED)]]
    spec = spec_of(tokens, unk_id=0, token_ranks=ranks, byte_fallback=True)
    best = dict(zip(MERGED, scores, strict=False))
    expected = [
        id_of
        for symbol in merged_slowly(list(text), best)
        for id_of in (
            [tokens.index(symbol)]
            if symbol in tokens
            else [tokens.index(BYTES[byte]) for byte in symbol.encode()]
        )
    ]
    assert unpack_tokens(SentencePieceBpe(spec).encode(text)) == expected


def merged_slowly(symbols: list[str], score_of: dict[str, float]) -> list[str]:
    while True:
        pairs = [
            (-score_of[left + right], at)
            for at, (left, right) in enumerate(pairwise(symbols))
            if left + right in score_of
        ]
        if not pairs:
            return symbols
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab.▁", max_size=80))
def test_few_and_many_symbols_are_merged_alike(text: str) -> None:
    id_of = {token: at for at, token in enumerate(MERGED)}
    merges = ScoreMerges([float(at // 3) for at in range(len(MERGED))], id_of)
    assert merges.merge_short(list(text)) == merges.merge_long(list(text))


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_no_token_reaches_across_a_cut(text: str) -> None:
    tokens = [*SINGLES, *MERGED]
    boundaries = Boundaries(tokens, unknown_fuses=True)
    assert boundaries.units is not None
    units = boundaries.units(text)
    assert "".join(units) == text
    for cuts in (units, [piece for unit in units for piece in boundaries.pieces(unit)]):
        at = 0
        for unit in cuts[:-1]:
            at += len(unit)
            around = [
                token
                for token in tokens
                for start in range(max(0, at - len(token) + 1), at)
                if text.startswith(token, start) and start + len(token) > at
            ]
            assert not around
            if 0 < at < len(text):
                assert text[at - 1] in SINGLES or text[at] in SINGLES


def test_a_vocabulary_of_phrases_is_not_cut_at_spaces() -> None:
    phrases = [f"{char}▁" for char in "abcdefghijklmnopqrst"]
    assert Boundaries(["▁", *phrases]).units is None


def test_a_token_that_is_across_is_found() -> None:
    boundaries = Boundaries(["▁", ">", "</", ">▁</", "▁a", "a", "b"])
    assert boundaries.units is not None
    units = boundaries.units("a>▁</b>▁a▁>▁</")
    assert [unit for unit in units if unit] == ["a", ">▁</", "b", ">", "▁a", "▁>▁</"]


def test_json_of_the_oracle_is_what_it_seems() -> None:
    """That `fuse_unk` and `byte_fallback` reach the oracle."""
    made = json.loads(
        Tokenizer(models.BPE({"<unk>": 0}, [], fuse_unk=True, byte_fallback=True)).to_str()
    )
    assert made["model"]["fuse_unk"]
    assert made["model"]["byte_fallback"]
