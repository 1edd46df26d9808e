"""Text that grows token by token equals all tokens decoded at once, at every moment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.detokenizer import Detokenizer, DetokenizerTable


def table_of(pieces: list[bytes], special: set[int]) -> DetokenizerTable:
    return DetokenizerTable(
        "digest",
        b"".join(pieces),
        b"".join(len(piece).to_bytes(2, "little") for piece in pieces),
        bytes(index in special for index in range(len(pieces))),
        (),
    )


# Bytes that are likely to stand in broken and whole characters of every length.
odd_bytes = st.lists(
    st.sampled_from([0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE0, 0xA0, 0xE2, 0x82, 0xAC, 0xED, 0xF0, 0x9F])
    | st.integers(0, 255),
    max_size=4,
).map(bytes)


@given(
    pieces=st.lists(odd_bytes, min_size=1, max_size=8),
    special=st.sets(st.integers(0, 7), max_size=2),
    pushes=st.lists(st.lists(st.integers(0, 7), max_size=4), max_size=12),
)
def test_any_tokens_in_any_pushes(
    pieces: list[bytes], special: set[int], pushes: list[list[int]]
) -> None:
    detokenizer = Detokenizer(table_of(pieces, special))
    text, data = "", b""
    for push in pushes:
        ids = [token_id % len(pieces) for token_id in push]
        text += detokenizer.push(ids)
        data += b"".join(pieces[i] for i in ids if i not in special)
        whole = data.decode("utf-8", "replace")
        assert whole.startswith(text)
    assert text + detokenizer.flush() == data.decode("utf-8", "replace")


@given(data=st.binary(max_size=12))
def test_any_bytes_one_by_one(data: bytes) -> None:
    detokenizer = Detokenizer(table_of([bytes([value]) for value in range(256)], set()))
    text = "".join(detokenizer.push([value]) for value in data)
    assert text + detokenizer.flush() == data.decode("utf-8", "replace")


def test_a_character_is_held_back_until_it_is_complete() -> None:
    detokenizer = Detokenizer(table_of(["😀".encode()[:2], "😀".encode()[2:], b"!"], set()))
    assert detokenizer.push([0]) == ""
    assert detokenizer.push([1]) == "😀"
    assert detokenizer.push([0, 2]) == "\N{REPLACEMENT CHARACTER}!"
    assert detokenizer.flush() == ""


def test_ids_outside_the_table_show_nothing() -> None:
    detokenizer = Detokenizer(table_of([b"a", b"b"], {1}))
    assert detokenizer.push([0, 1, 2, 0]) == "aa"
    assert detokenizer.push([77]) == ""


def test_a_table_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        DetokenizerTable("digest", b"abc", b"\2\0", b"\0", ())
    with pytest.raises(ValueError, match="do not fit"):
        DetokenizerTable("digest", b"ab", b"\2\0", b"\0\0", ())
