"""What a model thinks, apart from what it says.

    <think>
    reasoning
    </think>

    content

as DeepSeek-R1 and Qwen3 write it; a template may have opened the thought already.
White space around the marks belongs to neither. A thought that never ends is all
there is.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from services.gateway.parsers.base import overlap

OPEN = "<think>"
CLOSE = "</think>"


class Piece(NamedTuple):
    """Some of the answer."""

    is_reasoning: bool
    text: str


class ReasoningSplitter:
    """One answer. `is_open`: the prompt ends within a thought."""

    __slots__ = ("_at_start", "_held", "_state")

    def __init__(self, *, is_open: bool) -> None:
        self._state: Literal["start", "thought", "content"] = "thought" if is_open else "start"
        self._held = ""
        #: Nothing of the thought, or of what follows it, was shown yet.
        self._at_start = True

    def push(self, text: str) -> list[Piece]:
        """What these characters complete."""
        if self._state == "content" and not self._at_start:
            return [Piece(False, text)] if text else []
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._step(pieces):
            pass
        return pieces

    def end(self) -> list[Piece]:
        """What is left when the answer is over."""
        held, self._held = self._held, ""
        if self._state == "thought":
            held = held.rstrip()
        elif self._state == "content":
            held = ""
        return [Piece(self._state == "thought", held)] if held else []

    def _step(self, pieces: list[Piece]) -> bool:
        if self._state == "start":
            return self._start(pieces)
        if self._at_start:
            self._held = self._held.lstrip()
            if not self._held:
                return False
            self._at_start = False
        if self._state == "content":
            pieces.append(Piece(False, self._held))
            self._held = ""
            return False
        return self._think(pieces)

    def _start(self, pieces: list[Piece]) -> bool:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._held = begun.removeprefix(OPEN)
            self._state = "thought"
            return True
        if OPEN.startswith(begun):
            return False
        # All of it is content, the white space before it too.
        self._state, self._at_start = "content", False
        pieces.append(Piece(False, self._held))
        self._held = ""
        return False

    def _think(self, pieces: list[Piece]) -> bool:
        at = self._held.find(CLOSE)
        if at < 0:
            shown = self._held[: len(self._held) - overlap(self._held, CLOSE)].rstrip()
            self._held = self._held[len(shown) :]
            if shown:
                pieces.append(Piece(True, shown))
            return False
        if thought := self._held[:at].rstrip():
            pieces.append(Piece(True, thought))
        self._held = self._held[at + len(CLOSE) :]
        self._state, self._at_start = "content", True
        return True


def ends_in_thought(prompt_end: str) -> bool:
    """Whether a prompt with this end has opened a thought and not closed it."""
    return prompt_end.rstrip().endswith(OPEN)
