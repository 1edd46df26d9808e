"""Stop strings end a text at the same place however the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.stop_strings import StopMatcher


def one_character_at_a_time(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the first character that completes a stop string ends the text."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


def in_pieces(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        shown += text
        if matched:
            return shown, True
    return shown + matcher.flush(), False


few = st.text("ab", max_size=4)


@given(
    pieces=st.lists(few, max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_any_text_in_any_pieces(pieces: list[str], stops: list[str]) -> None:
    assert in_pieces(pieces, stops) == one_character_at_a_time("".join(pieces), stops)


@given(
    pieces=st.lists(few, max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_no_more_is_held_back_than_may_become_a_stop(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, fed = "", ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        shown, fed = shown + text, fed + piece
        if matched:
            return
        held = fed[len(shown) :]
        assert fed.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_examples() -> None:
    assert in_pieces(["The end.\n", "\nUs", "er: more"], ["\n\nUser:"]) == ("The end.", True)
    assert in_pieces(["a\n", "b\n"], ["\n\n"]) == ("a\nb\n", False)
    assert in_pieces(["xabcd"], ["abcd", "bc"]) == ("xa", True)
    assert in_pieces(["aab"], ["ab"]) == ("a", True)
