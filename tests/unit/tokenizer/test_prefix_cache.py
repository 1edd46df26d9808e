"""What is remembered gives the same ids as what is not."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.blocks import block_ids, namespace_key, pack_tokens
from services.tokenizer.backends.base import AddedToken
from services.tokenizer.backends.segments import Segmenter
from services.tokenizer.prefix_cache import ByteCache, PieceEncoder, packed_block_ids
from tests.unit.tokenizer.toy_specs import toy_spec

ADDED = [
    AddedToken(1000, "<a>", True),
    AddedToken(1001, "<a><b>", False),
    AddedToken(1002, "<b>", True),
    AddedToken(1003, "[INST]", False, lstrip=True),
    AddedToken(1004, "<norm>", False, normalized=True),
]
RSTRIP = AddedToken(1005, "<r>", True, rstrip=True)
SPACES = AddedToken(1006, "  ", False)
SINGLE = AddedToken(1007, "word", False, single_word=True)

VOCABULARIES = {
    "plain": ADDED,
    "rstrip": [*ADDED, RSTRIP],
    "spaces": [*ADDED, SPACES],
    "rstrip and spaces": [*ADDED, RSTRIP, SPACES],
    "single words": [*ADDED, SINGLE],
    "none": [],
}
PIECES = st.sampled_from(
    ["<a>", "<b>", "<a><b>", "<a", ">", "[INST]", "<norm>", "<r>", "word", " ", "  ", "\n", "x"]
)
LONG = st.builds(lambda unit, n: unit * n, st.sampled_from(["water ", "wörd", "x"]), st.just(60))


def encoder_of(added: list[AddedToken], prepend: str) -> Callable[[str], bytes]:
    """Each character of a segment is an id: whatever changes a segment shows."""
    segments = Segmenter(toy_spec(added, prepend)).segments

    def encode(text: str) -> bytes:
        ids: list[int] = []
        for segment in segments(text):
            # Where a segment begins counts as well.
            ids += [segment.token_id] if segment.token_id >= 0 else [1, *map(ord, segment.text)]
        return pack_tokens(ids)

    return encode


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(PIECES | LONG, max_size=25),
    more=st.lists(PIECES | LONG, max_size=10),
    prepend=st.sampled_from(["never", "first", "always"]),
)
@pytest.mark.parametrize("added", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_pieces_are_the_whole(
    added: list[AddedToken], parts: list[str], more: list[str], prepend: str
) -> None:
    encode = encoder_of(added, prepend)
    cached = PieceEncoder("m", encode, added, ByteCache(1 << 20))
    for text in ("".join(parts), "".join(parts + more), "".join(more), "".join(parts + more)):
        assert cached.encode(text) == encode(text)


def test_a_turn_is_encoded_from_the_last_cut() -> None:
    seen: list[str] = []

    def encode(text: str) -> bytes:
        seen.append(text)
        return pack_tokens(map(ord, text))

    cached = PieceEncoder("m", encode, ADDED, ByteCache(1 << 20))
    turns = [f"<a>{'water ' * 100}{number}" for number in range(5)]
    for end in range(1, 6):
        seen.clear()
        cached.encode("".join(turns[:end]) + "<a>go")
        assert seen == [turns[end - 1], "<a>go"]
    other = PieceEncoder("other", encode, ADDED, ByteCache(1 << 20))
    seen.clear()
    other.encode("".join(turns))
    assert len(seen) == 5


def test_the_cache_is_bounded_and_forgets_what_was_not_used() -> None:
    cache = ByteCache(10_000)
    cache.put("kept", b"k", 4)
    for number in range(1000):
        cache.put(number, bytes(100), 8)
        assert cache.num_bytes <= 10_000
        assert cache.get("kept") == b"k"
    assert cache.get(999) == bytes(100)
    assert cache.get(0) is None
    cache.put("long", bytes(20_000), 4)
    assert cache.get("long") is None
    assert cache.get("kept") == b"k"


def test_remembered_block_ids_are_the_same() -> None:
    rng = random.Random(3)
    cache = ByteCache(1 << 20)
    tokens = pack_tokens(rng.randrange(50_000) for _ in range(5000))
    for size in (1, 7, 16, 64):
        for key in (namespace_key("a"), namespace_key("b")):
            for end in (0, 3, 1023, 1024, 1025, 3000, 5000):
                for start in (tokens, pack_tokens([7]) + tokens):
                    expected = b"".join(block_ids(start[: 4 * end], size, key))
                    assert packed_block_ids(start[: 4 * end], size, key, cache) == expected
