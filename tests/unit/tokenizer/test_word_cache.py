"""The word cache: what it computes, what it keeps, and that it is bounded."""

from __future__ import annotations

import random
import tracemalloc

from services.tokenizer.backends.word_cache import MAX_WORD_LEN, WordCache


def test_it_computes_once_and_keeps_what_is_used() -> None:
    asked: list[str] = []

    def encode(word: str) -> bytes:
        asked.append(word)
        return word.encode()

    cache = WordCache(encode, half_len=20_000)
    rng = random.Random(4)
    for _ in range(5000):
        assert cache["abcd"] == b"abcd"
        cache["".join(rng.choices("abcd", k=40))]
    assert asked.count("abcd") == 1
    assert len(asked) == 5001


def test_words_that_never_come_again_do_not_grow_it() -> None:
    cache = WordCache(str.encode, half_len=200_000)
    rng = random.Random(5)

    def fill() -> int:
        for _ in range(20_000):
            cache["".join(rng.choices("abcdefghij你", k=9))]
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    fill()
    filled = [fill() for _ in range(4)]
    tracemalloc.stop()
    # What it counts is what it takes: two halves, and the table of a dict.
    assert max(filled) < 2 * 200_000 + 100_000


def test_long_words_are_not_kept() -> None:
    cache = WordCache(str.encode)
    cache["a" * MAX_WORD_LEN]
    cache["a" * (MAX_WORD_LEN + 1)]
    assert list(cache) == ["a" * MAX_WORD_LEN]
