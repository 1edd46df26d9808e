"""What parsers of tool calls share: what they say, and text that is watched for a mark.

A call is said once it is complete and sound. What looked like one and is not, is
text: every character of an answer is in a text or in a call, but for the marks and
the white space around calls.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

#: Characters of one call; what is longer is text.
MAX_CALL_LEN = 1 << 20


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How a model writes what is not plain text."""

    #: An entry of `TOOL_PARSERS`; empty: it calls no tools that anyone here could read.
    tool_parser: str = ""
    #: Whether it may think between `<think>` and `</think>`.
    has_reasoning: bool = False


class Text(NamedTuple):
    """Text for the reader."""

    text: str


class Call(NamedTuple):
    """A complete call of a function; `arguments` is a JSON object."""

    name: str
    arguments: str


Event = Text | Call


class ToolParser:
    """One answer. Subclasses read `self._held` in `_step`, and say what they find.

    `names` are the functions that may be called: another's is no call.
    """

    #: Whether special tokens must be in the text.
    needs_special: ClassVar[bool] = False
    #: Length of a call's id, where a model's template insists on one; 0: free.
    id_len: ClassVar[int] = 0

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._events: list[Event] = []
        #: Set while what is held may be a call.
        self._scan: JsonEnd | None = None
        #: White space that is text if more text follows, and nothing beside a call.
        self._space = ""
        self._after_call = False

    @classmethod
    def opening(cls, name: str | None) -> str:
        """How an answer begins that calls `name`, or some function if it is None."""
        raise NotImplementedError

    def push(self, text: str) -> Sequence[Event]:
        """What these characters complete."""
        self._held += text
        return self._run(is_end=False)

    def end(self) -> Sequence[Event]:
        """What is left when the answer is over."""
        events = self._run(is_end=True)
        self._say_text(self._held)
        self._held = ""
        if self._space and not self._after_call:
            events.append(Text(self._space))
            self._space = ""
        return events

    def _run(self, *, is_end: bool) -> list[Event]:
        self._events = []
        while self._held and self._step(is_end=is_end):
            pass
        if len(self._held) > MAX_CALL_LEN:
            self._no_call(len(self._held))
        return self._events

    def _step(self, *, is_end: bool) -> bool:
        """Take something from `_held`; False if that needs more characters."""
        raise NotImplementedError

    def _say_text(self, text: str) -> None:
        """Text, but for the white space at its end, which waits for what follows."""
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if not kept:
            return
        if self._after_call:
            kept = kept.lstrip()
            self._after_call = False
        if self._events and isinstance(self._events[-1], Text):
            kept = self._events.pop()[0] + kept
        self._events.append(Text(kept))

    def _say_call(self, call: Call) -> None:
        self._space = ""
        self._after_call = True
        self._events.append(call)

    def _no_call(self, count: int) -> bool:
        """What is held began like a call: so much of it is text."""
        self._scan = None
        self._say_text(self._take(count))
        return True

    def _find(self, mark: str) -> bool:
        """Take the text before `mark`; False if all that is held was text, or may become it."""
        at = self._held.find(mark)
        if at < 0:
            self._say_text(self._take(len(self._held) - overlap(self._held, mark)))
            return False
        if at:
            self._say_text(self._take(at))
        return True

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _call_of(self, value: object, *keys: str) -> Call | None:
        """The call that a JSON object is, its arguments under the first of `keys` that it has."""
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = next((value[key] for key in keys if key in value), None)
        if not isinstance(arguments, dict):
            return None
        text = dumped(arguments)
        return None if text is None else Call(value["name"], text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


#: Models write line breaks into strings as they are.
_decoder = json.JSONDecoder(strict=False, parse_constant=_no_constant)


def loaded(text: str) -> Any:
    """The JSON value that `text` is; None if it is none."""
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError):
        return None


def dumped(value: object) -> str | None:
    """`value` as JSON that can be encoded; None if there is no such thing."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        # Half a character, which JSON can write and UTF-8 can not.
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return text


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`, but is not all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


class JsonEnd:
    """Finds where the JSON object or array that begins at `start` ends, as its text grows."""

    __slots__ = ("_at", "_depth", "_end", "_in_string", "_is_escaped", "start")

    def __init__(self, start: int) -> None:
        self.start = start
        self._at = start
        self._end = -1
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def find(self, text: str) -> int:
        """One past its last character; -1 if that has not come. `text` must begin with what
        it was at the last call."""
        if self._end >= 0:
            return self._end
        for at in range(self._at, len(text)):
            char = text[at]
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._end = at + 1
                    return self._end
        self._at = len(text)
        return -1
