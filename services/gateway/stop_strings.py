"""Stop strings in a text that comes in pieces.

The result never depends on how the text is split: it is as if characters came
one by one, and the sequence ended with the first character that completes a stop
string. Text that may still become one is held back:

    given out | held: the longest end of the text that begins a stop string

It knows characters only, no tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopMatcher:
    """Watches one sequence's text for `stops`, none of them empty."""

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string is complete.

        After a match the shown text ends right before the stop string, and the
        matcher must not be used again.
        """
        if not text:
            return "", False
        text = self._held + text
        found = self._first_match(text)
        if found is not None:
            return text[:found], True
        held = max(_overlap(text, stop) for stop in self._stops)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, when the sequence ends otherwise."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        """Where the match begins that is complete first (the longest of several)."""
        matches = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        return min(matches)[1] if matches else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    first = stop[0]
    start = text.find(first, max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(first, start + 1)
    return 0
