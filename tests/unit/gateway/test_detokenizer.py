"""Text that grows token by token equals all tokens decoded at once, at every moment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import INVALID_SPAN

from headrace.blocks import pack_tokens
from headrace.params import SamplingParams
from services.gateway.detokenizer import Detokenizer, DetokenizerTable, TableContent
from services.gateway.generation import ChatMessage, GenerationRequest
from services.gateway.ids import new_request_id
from services.tokenizer.backends.token_texts import TokenTexts


def lengths_of(pieces: list[bytes]) -> bytes:
    return b"".join(len(piece).to_bytes(2, "little") for piece in pieces)


def content_of(texts: TokenTexts) -> TableContent:
    pieces, firsts = list(texts.pieces), list(texts.first.values())
    return TableContent(
        "digest",
        b"".join(pieces),
        lengths_of(pieces),
        bytes(index in texts.special_ids for index in range(len(pieces))),
        replaces_each_byte=texts.replaces_each_byte,
        strips_first_space=texts.strips_first_space,
        first_ids=pack_tokens(texts.first),
        first_data=b"".join(firsts),
        first_lengths=lengths_of(firsts),
    )


def table_of(pieces: list[bytes], special: set[int] | None = None) -> DetokenizerTable:
    return DetokenizerTable(content_of(TokenTexts(pieces, frozenset(special or ()))))


# Bytes that are likely to stand in broken and whole characters of every length.
odd_bytes = st.lists(
    st.sampled_from(
        [0x20, 0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE0, 0xA0, 0xE2, 0x82, 0xAC, 0xED, 0xF0, 0x9F]
    )
    | st.integers(0, 255),
    max_size=4,
).map(bytes)


@given(
    texts=st.builds(
        TokenTexts,
        st.lists(odd_bytes, min_size=1, max_size=8),
        st.frozensets(st.integers(0, 7), max_size=2),
        replaces_each_byte=st.booleans(),
        strips_first_space=st.booleans(),
        first=st.dictionaries(st.integers(0, 7), odd_bytes, max_size=3),
    ),
    pushes=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=12),
    skip=st.booleans(),
    goes_on=st.booleans(),
)
def test_any_tokens_in_any_pushes(
    texts: TokenTexts, pushes: list[list[int]], skip: bool, goes_on: bool
) -> None:
    whole = replace(texts, first={}, strips_first_space=False) if goes_on else texts
    detokenizer = Detokenizer(
        DetokenizerTable(content_of(texts)), goes_on=goes_on, skip_special=skip
    )
    text, ids = "", list[int]()
    for push in pushes:
        text += detokenizer.push(push)
        ids += push
        assert whole.decode(ids, skip_special=skip).startswith(text)
    assert text + detokenizer.flush() == whole.decode(ids, skip_special=skip)


@pytest.mark.parametrize("each", [False, True])
@given(data=st.binary(max_size=12))
def test_any_bytes_one_by_one(each: bool, data: bytes) -> None:
    texts = TokenTexts([bytes([value]) for value in range(256)], frozenset(), each)
    detokenizer = Detokenizer(DetokenizerTable(content_of(texts)))
    text = "".join(detokenizer.push([value]) for value in data)
    assert text + detokenizer.flush() == texts.decode(data, skip_special=False)


def test_a_character_is_held_back_until_it_is_complete() -> None:
    detokenizer = Detokenizer(table_of(["😀".encode()[:2], "😀".encode()[2:], b"!"]))
    assert detokenizer.push([0]) == ""
    assert detokenizer.push([1]) == "😀"
    assert detokenizer.push([0, 2]) == "\N{REPLACEMENT CHARACTER}!"
    assert detokenizer.flush() == ""


def test_special_tokens_are_shown_if_asked_for() -> None:
    table = table_of([b"a", b"<s>"], {1})
    assert Detokenizer(table).push([0, 1, 2, 0]) == "aa"
    assert Detokenizer(table, skip_special=False).push([0, 1, 2, 0]) == "a<s>a"
    assert [Detokenizer(table, skip_special=skip).push([1]) for skip in (True, False)] == [
        "",
        "<s>",
    ]


def test_ids_outside_the_table_show_nothing() -> None:
    detokenizer = Detokenizer(table_of([b"a", b"b"], {1}))
    assert detokenizer.push([77]) == ""
    assert detokenizer.push([0, 77]) == "a"


def test_the_first_space_is_dropped_only_where_nothing_is_shown_before() -> None:
    table = DetokenizerTable(
        content_of(TokenTexts([b"<s>", b" a"], frozenset([0]), strips_first_space=True))
    )
    alone = Detokenizer(table)
    assert [alone.push(ids) for ids in ([0], [], [1], [1])] == ["", "", "a", " a"]
    assert Detokenizer(table).push([0, 1, 1]) == "a a"
    assert Detokenizer(table, goes_on=True).push([1]) == " a"
    assert Detokenizer(table, skip_special=False).push([0, 1]) == "<s> a"


async def test_a_table_that_is_read_in_slices_is_the_same() -> None:
    pieces = [b"%d" % number for number in range(10_000)] + [b"\xc3"]
    content = content_of(TokenTexts(pieces, frozenset([1, 9_999]), first={3: b"three"}))
    table, loaded = DetokenizerTable(content), await DetokenizerTable.load(content)
    assert loaded.pieces == table.pieces
    assert loaded.pieces_with_special == table.pieces_with_special
    assert loaded.pieces[1] == ""
    assert loaded.pieces_with_special[1] == "1"
    assert Detokenizer(loaded).push([1, 3, 3]) == "three3"


@pytest.mark.parametrize(
    "change",
    [
        {"data": b"abc"},
        {"special": b"\0\0"},
        {"first_ids": pack_tokens([0])},
        {"first_ids": pack_tokens([0]), "first_lengths": b"\2\0", "first_data": b"x"},
    ],
)
def test_a_table_that_does_not_fit_is_refused(change: dict[str, bytes]) -> None:
    content = TableContent("digest", b"ab", b"\2\0", b"\0")
    DetokenizerTable(content)
    with pytest.raises(ValueError, match="do not fit"):
        DetokenizerTable(replace(content, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_chat", [False, True])
async def test_an_answer_begins_without_a_space_and_a_completion_keeps_it(
    mesh: Any, is_chat: bool
) -> None:
    """Also behind a migration, where the text's state goes on."""
    mesh.tokenizer.strips_first_space = True
    await mesh.start(num_workers=2)
    for worker in mesh.workers:
        worker.script = lambda position: b" a"[position % 2]
    first, _ = mesh.workers
    first.allowance = 2
    prompt: dict[str, Any] = (
        {"messages": (ChatMessage("user", "hello"),)} if is_chat else {"prompt": "hello"}
    )
    request = GenerationRequest(
        new_request_id(), "bytes", sampling=SamplingParams(max_tokens=6), **prompt
    )
    sink = mesh.new_sink()
    await mesh.pipeline.start(request, sink, INVALID_SPAN)
    await mesh.eventually(lambda: sink.texts.get(0, "").endswith("a"))
    await first.kill()
    await mesh.eventually(lambda: sink.is_over)
    assert sink.error is None
    assert sink.texts == {0: "a a a" if is_chat else " a a a"}
