"""Byte-level BPE against its definition: fast paths, whole characters, ranks; what it refuses."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.blocks import unpack_tokens
from headrace.errors import StartupError
from services.tokenizer.backends import TokenizerSpec, load_backend
from services.tokenizer.backends.base import AddedToken
from services.tokenizer.backends.byte_level_bpe import _WordEncoder
from services.tokenizer.backends.characters import Characters
from services.tokenizer.backends.merges import Merges
from services.tokenizer.backends.token_texts import BYTE_CHARS, bytes_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ADDED = [AddedToken(0, "<s>", True), AddedToken(1, "<s>>", False)]
#: Characters whose bytes share beginnings and ends, of one to four bytes.
ALPHABET = "ab éèǩ你佀作他乀" + "\U0001f600\U0001f601\U0001f640"


class Lines:
    """A pre-tokenizer that leaves all in one word."""

    def words(self, text: str) -> Iterator[list[str]]:
        yield [text]


def letters_of(text: str) -> str:
    """`text` in the vocabulary's spelling of bytes."""
    return "".join(BYTE_CHARS[byte] for byte in text.encode())


@cache
def random_spec(seed: int, *, trained: bool, lacking: str = "") -> TokenizerSpec:
    """A vocabulary of random merges of the alphabet's bytes.

    `trained`: parts come from real text and before what they make, as training makes
    them; else merges are ranked at random and may join anything.
    """
    rng = random.Random(seed)
    letters = sorted({*letters_of(ALPHABET)} - {*lacking})
    tokens = ["<s>", "<s>>", *letters]
    text = letters_of("".join(rng.choices(ALPHABET, k=400)))
    merges: list[tuple[str, str]] = []
    symbols = [letter for letter in text if letter not in lacking]
    while len(merges) < 60:
        if trained:
            at = rng.randrange(len(symbols) - 1)
            pair = (symbols[at], symbols[at + 1])
        else:
            pair = (rng.choice(tokens[2:]), rng.choice(tokens[2:]))
        if pair in merges or len("".join(pair)) > 12:
            continue
        merges.append(pair)
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
        symbols = merge_plainly([pair], symbols)
        if len(symbols) < 50:
            symbols = list(text)
    if not trained:
        rng.shuffle(merges)
    return TokenizerSpec(
        "test", "byte_level_bpe", tokens, ADDED, pre_tokenizer=Lines(), merges=merges
    )


def merge_plainly(merges: Sequence[tuple[str, str]], symbols: list[str]) -> list[str]:
    """The definition: of all adjacent pairs the one of lowest rank merges, leftmost first."""
    symbols = list(symbols)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        pairs = [(ranks[p], at) for at, p in enumerate(pairwise(symbols)) if p in ranks]
        if not pairs:
            return symbols
        _, at = min(pairs)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 15),
    trained=st.booleans(),
    lacking=st.sampled_from(["", "a", letters_of("\U0001f600")[0], letters_of("你")[1]]),
    word=st.text(ALPHABET, max_size=60),
)
def test_encoding_is_the_definition(seed: int, trained: bool, lacking: str, word: str) -> None:
    spec = random_spec(seed, trained=trained, lacking=lacking)
    letters = [letter for letter in letters_of(word) if letter not in lacking]
    expected = merge_plainly(spec.merges, letters)
    ids = unpack_tokens(load_backend(spec).encode(word))
    assert [spec.tokens[i] for i in ids] == expected


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 15), word=st.text(ALPHABET, max_size=60))
def test_both_merges_agree(seed: int, word: str) -> None:
    spec = random_spec(seed, trained=seed % 2 == 0)
    id_of = {token: at for at, token in enumerate(spec.tokens)}
    merges = Merges.of_pairs(spec.merges, id_of, len(spec.tokens), "test")
    ids = [id_of[letter] for letter in letters_of(word)]
    assert merges.merge_short(list(ids)) == merges.merge_long(list(ids))


def test_most_words_start_from_whole_characters() -> None:
    spec = random_spec(1, trained=True)
    plain = {token: at for at, token in enumerate(spec.tokens)}
    merges = Merges.of_pairs(spec.merges, plain, len(spec.tokens), "test")
    pieces = [bytes_of(token) for token in spec.tokens]
    byte_ids = [plain.get(char) for char in BYTE_CHARS]
    characters = Characters(merges, byte_ids, pieces)
    shorter = sum(len(characters.symbols(char)) < len(char.encode()) for char in ALPHABET[3:])
    assert shorter > 3


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 30), word=st.text("abcd", max_size=90))
def test_ranks_are_tiktokens(seed: int, word: str) -> None:
    """Whatever pair is a token together merges, the lowest rank first, leftmost if equal."""
    rng = random.Random(seed)
    tokens = [*"abcd"]
    while len(tokens) < 60:
        token = "".join(rng.choices(tokens, k=2))
        if token not in tokens and len(token) < 9:
            tokens.append(token)
    ranks: list[float] = list(range(len(tokens)))
    rng.shuffle(ranks)
    spec = TokenizerSpec("test", "byte_level_bpe", tokens, pre_tokenizer=Lines(), token_ranks=ranks)
    rank_of = dict(zip(tokens, ranks, strict=True))
    symbols = [*word]
    while pairs := [
        (rank_of[a + b], at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in rank_of
    ]:
        _, at = min(pairs)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    assert [tokens[i] for i in unpack_tokens(load_backend(spec).encode(word))] == symbols


def test_a_long_word_takes_work_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in look-ups of pairs: no more than a few for each of 100,000 bytes."""
    spec = random_spec(3, trained=True)
    encoder = _WordEncoder(spec, [bytes_of(token) for token in spec.tokens])
    num_looked_up = 0

    class Counting(dict[int, int]):
        def get(self, key: int, default: int = 0) -> int:  # type: ignore[override]
            nonlocal num_looked_up
            num_looked_up += 1
            return super().get(key, default)

    monkeypatch.setattr(encoder._merges, "_pairs", Counting(encoder._merges._pairs))
    for word in ("a" * 100_000, "".join(random.Random(4).choices(ALPHABET, k=40_000))):
        num_looked_up = 0
        encoder(word)
        assert num_looked_up < 4 * len(word.encode())


def test_the_longest_added_token_wins_and_can_be_left_as_text() -> None:
    backend = load_backend(random_spec(1, trained=True))
    assert unpack_tokens(backend.encode("<s>><s>")) == [1, 0]
    assert not {0, 1} & {*unpack_tokens(backend.encode("a<s>ab", parse_added=False))}
    assert backend.texts.decode([0, 1], skip_special=True) == "<s>>"


def test_a_word_that_is_a_token_becomes_it_if_merges_are_ignored() -> None:
    spec = TokenizerSpec(
        "test",
        "byte_level_bpe",
        ["a", "b", "ab", "abb", "<s>"],
        [AddedToken(4, "<s>", True)],
        pre_tokenizer=Lines(),
        merges=[("a", "b")],
        ignore_merges=True,
    )
    backend = load_backend(spec)
    assert unpack_tokens(backend.encode("abb")) == [3]
    assert unpack_tokens(backend.encode("abba")) == [2, 1, 0]
    # As text, what names an added token is none.
    assert unpack_tokens(backend.encode("<s>", parse_added=False)) == []


def test_what_the_vocabulary_lacks_vanishes_or_is_unknown() -> None:
    tokens = ["a", "b", "ab", "<unk>"]
    for unk_id, expected in ((None, [2]), (3, [0, 3, 1])):
        spec = TokenizerSpec(
            "test",
            "byte_level_bpe",
            tokens,
            [AddedToken(3, "<unk>", True)],
            pre_tokenizer=Lines(),
            merges=[("a", "b")],
            unk_id=unk_id,
        )
        assert unpack_tokens(load_backend(spec).encode("axb")) == expected


def test_a_merge_of_no_tokens_is_named() -> None:
    spec = TokenizerSpec(
        "file f", "byte_level_bpe", ["a"], pre_tokenizer=Lines(), merges=[("a", "z")]
    )
    with pytest.raises(StartupError, match=r"file f: merge 0 \('a', 'z'\) names 'z'"):
        load_backend(spec)


def test_a_vocabulary_without_pre_tokenizer_is_refused() -> None:
    with pytest.raises(StartupError, match="file f: byte-level BPE needs a pre-tokenizer"):
        load_backend(TokenizerSpec("file f", "byte_level_bpe", ["a"]))


def test_a_character_whose_token_would_merge_too_early_starts_as_bytes() -> None:
    """é + a comes first, but é is not there before a + b has merged."""
    first, second = letters_of("é")
    merges = [(first + second, "a"), ("a", "b"), (first, second)]
    tokens = [first, second, "a", "b", first + second, first + second + "a", "ab"]
    spec = TokenizerSpec("test", "byte_level_bpe", tokens, pre_tokenizer=Lines(), merges=merges)
    assert unpack_tokens(load_backend(spec).encode("éab")) == [4, 6]
