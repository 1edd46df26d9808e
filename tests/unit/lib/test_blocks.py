"""Block ids: the chain, the namespaces, the packing."""

from __future__ import annotations

from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import blocks

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=100)


def test_ids_follow_the_formula() -> None:
    key = blocks.namespace_key("rev")
    tokens = blocks.pack_tokens([1, 2, 3, 4, 5])
    first = blake2b(b"\1\0\0\0\2\0\0\0", digest_size=16, key=key).digest()
    second = blake2b(b"\3\0\0\0\4\0\0\0", digest_size=16, key=first).digest()
    assert blocks.block_ids(tokens, 2, key) == [first, second]


def test_a_known_vector_stays() -> None:
    """Ids are stored in Redis and compared between versions: they must never change."""
    assert blocks.hash_vector(16).hex() == (
        "d9c666dce715e1b8b69eaf8986117f2bf58333935d640773998781fe95446ccca16c422ee4e2f81d6538a0ad4ab52fc5"
    )


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_equal_prefixes_have_equal_ids_and_others_do_not(
    left: list[int], right: list[int], size: int
) -> None:
    key = blocks.namespace_key("rev")
    a = blocks.block_ids(blocks.pack_tokens(left), size, key)
    b = blocks.block_ids(blocks.pack_tokens(right), size, key)
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        end = (i + 1) * size
        assert (x == y) == (left[:end] == right[:end])
    assert len(a) == len(left) // size


def test_namespaces_do_not_run_together() -> None:
    keys = {
        blocks.namespace_key("ab", adapter="c"),
        blocks.namespace_key("a", adapter="bc"),
        blocks.namespace_key("ab", adapter="c", tenant_salt=b"x"),
        blocks.namespace_key("ab", adapter="c", media_digests=[b"x"]),
        blocks.namespace_key("abc"),
    }
    assert len(keys) == 5


@given(TOKENS)
def test_tokens_pack_both_ways(tokens: list[int]) -> None:
    assert blocks.unpack_tokens(blocks.pack_tokens(tokens)) == tokens


def test_short_ids_are_the_first_eight_bytes() -> None:
    ids = blocks.block_ids(blocks.pack_tokens(range(8)), 4, blocks.namespace_key("r"))
    assert blocks.short_ids(b"".join(ids)) == [blocks.short_id(i) for i in ids]
    assert blocks.short_id(ids[0]).to_bytes(8, "little") == ids[0][:8]


def test_bad_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        blocks.short_ids(b"123")
    with pytest.raises(ValueError, match="multiple"):
        blocks.unpack_tokens(b"123")
