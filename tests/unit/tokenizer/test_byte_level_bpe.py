"""The fast paths of byte-level BPE against their plain twins; bounds of the cache."""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.blocks import unpack_tokens
from headrace.errors import StartupError
from headrace.models.files import ModelFiles
from services.tokenizer.backends import TokenizerSpec, load_backend, read_spec
from services.tokenizer.backends.base import BACKENDS, AddedToken
from services.tokenizer.backends.byte_level_bpe import ByteLevelBpe, _Merges, _WordCache
from services.tokenizer.backends.pre_tokenizers import PRE_TOKENIZERS

LETTERS = "abcd"
ADDED = [AddedToken(0, "<s>", True), AddedToken(1, "<s>>", False), AddedToken(2, "ab", False)]


def random_spec(rng: random.Random) -> TokenizerSpec:
    """A vocabulary of random merges, ranked at random, over four letters."""
    tokens = ["<s>", "<s>>", "ab", *LETTERS]
    merges: list[tuple[str, str]] = []
    while len(merges) < 40:
        pair = (rng.choice(tokens[3:]), rng.choice(tokens[3:]))
        if pair not in merges and len("".join(pair)) < 9:
            merges.append(pair)
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
    rng.shuffle(merges)
    return TokenizerSpec("test", "byte_level_bpe", "gpt2", tokens, merges, ADDED)


def merge_plainly(spec: TokenizerSpec, word: str) -> list[str]:
    """The definition: of all adjacent pairs the one of lowest rank merges, leftmost first."""
    symbols = list(word)
    ranks = {pair: rank for rank, pair in enumerate(spec.merges)}
    while True:
        pairs = [(ranks[p], at) for at, p in enumerate(pairwise(symbols)) if p in ranks]
        if not pairs:
            return symbols
        _, at = min(pairs)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 30), word=st.text(LETTERS, max_size=120))
def test_both_merges_are_the_definition(seed: int, word: str) -> None:
    spec = random_spec(random.Random(seed))
    merges = _Merges(spec)
    letters = [spec.tokens.index(letter, 3) for letter in word]
    expected = merge_plainly(spec, word)
    for merge in (merges._merge_short, merges._merge_long):
        assert [spec.tokens[i] for i in merge(list(letters))] == expected


def test_the_longest_added_token_wins_and_can_be_left_as_text() -> None:
    backend = load_backend(random_spec(random.Random(1)))
    assert unpack_tokens(backend.encode("<s>><s><s>>>ab")) == [1, 0, 1, 2]
    plain = unpack_tokens(backend.encode("a<s>ab", parse_added=False))
    assert not {0, 1} & {*plain}
    assert backend.decode([0, 1, 2], skip_special=True) == "<s>>ab"


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(text=st.text(" \n'rvelts1²a\u0558é!\U00011de0", max_size=80), window=st.integers(1, 12))
def test_windows_and_patterns_cut_alike(name: str, text: str, window: int) -> None:
    entry = PRE_TOKENIZERS[name]
    expected = entry.exact_pattern.findall(text)
    assert "".join(expected) == text
    assert [word for some in entry.words(text, window) for word in some] == expected


@pytest.mark.parametrize("window", range(1, 20))
def test_no_window_cuts_a_contraction(window: int) -> None:
    entry = PRE_TOKENIZERS["gpt2"]
    text = "we're you've she'll it's 12   'r x're\n\n " * 3
    expected = entry.exact_pattern.findall(text)
    assert [word for some in entry.words(text, window) for word in some] == expected


def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    merges = _Merges(random_spec(random.Random(3)))
    cache = _WordCache(merges, half_len=20_000)
    expected = cache["abcd"]
    rng = random.Random(4)
    for _ in range(5000):
        cache["".join(rng.choices(LETTERS, k=40))]
        assert cache["abcd"] == expected
    assert sum(len(half) for half in (cache, cache._old)) < 300
    assert "abcd" in cache or "abcd" in cache._old
    cache["a" * 1000]
    assert "a" * 1000 not in cache


def test_unique_words_do_not_grow_memory(smollm2: ModelFiles) -> None:
    backend = load_backend(read_spec(smollm2))
    assert isinstance(backend, ByteLevelBpe)
    backend._words = _WordCache(backend._words._merges, half_len=200_000)
    rng = random.Random(5)

    def text() -> str:
        return " ".join("".join(rng.choices("abcdefghij", k=9)) for _ in range(4000))

    backend.encode(text())
    tracemalloc.start()
    backend.encode(text())
    first = tracemalloc.get_traced_memory()[0]
    for _ in range(5):
        backend.encode(text())
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 500_000


def test_every_family_is_there() -> None:
    for entry in BACKENDS.values():
        module, _, name = entry.partition(":")
        assert module.startswith("services.tokenizer.backends.")
        assert name


def test_a_merge_of_no_tokens_is_named() -> None:
    spec = TokenizerSpec("file f", "byte_level_bpe", "gpt2", ["a"], [("a", "z")])
    with pytest.raises(StartupError, match=r"file f: merge 0 \('a', 'z'\) names 'z'"):
        load_backend(spec)
