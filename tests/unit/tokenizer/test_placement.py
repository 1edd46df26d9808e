"""Which process a request goes to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tokenizer import placement
from services.tokenizer.work import (
    Chat,
    Decode,
    EncodeBatch,
    EncodeChat,
    EncodedBatch,
    EncodeOptions,
    EncodeText,
    Message,
    Work,
)

SHORT, LONG = 200, 1_000_000


def choose(loads: dict[int, int], kind: placement.Kind, session: int | None = None) -> int | None:
    slots = [*loads.items()]
    at = placement.choose(slots, kind, session, placement.num_kept_free(len(slots)))
    return None if at is None else slots[at][0]


def test_the_fewest_queued_bytes_win() -> None:
    assert choose({0: 5000, 1: 300, 2: 400}, "short") == 1
    assert choose({0: 0, 1: 300, 2: 200}, "long") == 2
    assert choose({2: 300, 1: 200, 0: 100}, "part") == 0


@pytest.mark.parametrize(("count", "free"), [(1, 0), (2, 1), (3, 1), (8, 1), (16, 2), (64, 8)])
def test_some_processes_are_kept_free_of_what_is_long(count: int, free: int) -> None:
    assert placement.num_kept_free(count) == free
    loads = dict.fromkeys(range(count), 10 * LONG) | dict.fromkeys(range(free), 0)
    assert choose(loads, "long") not in range(free)
    assert choose(loads, "short") in range(max(1, free))


def test_a_long_request_waits_for_a_process_that_takes_it() -> None:
    assert placement.choose([(0, 0)], "long", None, 1) is None
    assert placement.choose([], "short", None, 1) is None


@given(session=st.integers(0, 2**32 - 1), count=st.integers(2, 20))
def test_a_session_stays_where_it_was(session: int, count: int) -> None:
    idle = dict.fromkeys(range(count), 0)
    home = choose(idle, "short", session)
    assert home is not None
    assert choose(idle | {home: 10_000}, "short", session) == home
    assert choose(idle | {home: LONG}, "short", session) != home
    # Another process's death moves only its own sessions.
    for gone in range(count):
        if gone != home:
            assert choose({s: 0 for s in idle if s != gone}, "short", session) == home
    # What grows long moves only out of the processes that are kept free.
    if home >= placement.num_kept_free(count):
        assert choose(idle, "long", session) == home


def test_sessions_spread() -> None:
    idle = dict.fromkeys(range(8), 0)
    homes = [choose(idle, "short", number * 2654435761 % 2**32) for number in range(800)]
    assert min(homes.count(slot) for slot in idle) > 50


def test_all_turns_of_a_chat_are_one_session() -> None:
    def session(*messages: tuple[str, str]) -> int | None:
        chat = Chat([Message(role, content) for role, content in messages])
        return placement.session_of(EncodeChat("m", chat), 10_000)

    system, first = ("system", "S" * 3000), ("user", "question")
    turn = session(system, first)
    assert turn is not None
    assert session(system, first, ("assistant", "a"), ("user", "b")) == turn
    assert session(system, ("user", "another question")) != turn
    assert session(first) == session(first, ("assistant", "a")) != turn
    text = "x" * 5000
    assert placement.session_of(EncodeText("m", text), 5000) == placement.session_of(
        EncodeText("m", text + "more"), 5004
    )
    assert placement.session_of(EncodeText("m", "short"), 5) is None
    assert placement.session_of(Decode("m", bytes(5000)), 5000) is None


@pytest.mark.parametrize(
    ("item", "length", "kind"),
    [
        (EncodeText("m", "x"), SHORT, "short"),
        (EncodeText("m", "x"), LONG, "long"),
        (EncodeBatch("m", [b"x"]), SHORT, "part"),
        (EncodeBatch("m", [b"x"]), LONG, "long"),
        (Decode("m", b""), LONG, "long"),
    ],
)
def test_kinds(item: Work, length: int, kind: str) -> None:
    assert placement.kind_of(item, length) == kind


@given(texts=st.lists(st.binary(max_size=9000), min_size=1, max_size=60), first=st.integers(0, 9))
def test_a_batch_is_split_in_order_and_put_together(texts: list[bytes], first: int) -> None:
    options = EncodeOptions(max_tokens=7)
    parts = placement.split(EncodeBatch("m", texts, options, first))
    assert [text for part in parts for text in part.texts] == texts
    at = first
    for part in parts:
        assert (part.first, part.model, part.options) == (at, "m", options)
        at += len(part.texts)
        assert len(part.texts) == 1 or sum(map(len, part.texts)) <= placement.PART_BYTES
    answers = [EncodedBatch(b"".join(p.texts), bytes(4 * len(p.texts)), "d") for p in parts]
    joined = placement.joined(answers)
    assert joined == EncodedBatch(b"".join(texts), bytes(4 * len(texts)), "d")


def test_a_large_batch_has_not_too_many_parts() -> None:
    texts = [bytes(100)] * 200_000
    assert 100 < len(placement.split(EncodeBatch("m", texts))) <= 2 * placement.MAX_PARTS
