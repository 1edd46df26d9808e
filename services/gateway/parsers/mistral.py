"""Tool calls as Mistral's models write them, the older and the newer way.

    [TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, …]
    [TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}

A call's id may follow its name, in a member `id` or after `[CALL_ID]`; it gets one of
ours all the same. The marks are special tokens. Both parsers read both ways: a way
differs in how it is asked for.
"""

from __future__ import annotations

import json
import re

from services.gateway.parsers.base import Call, JsonEnd, ToolParser, loaded

_OPEN = "[TOOL_CALLS]"
_ARGS = "[ARGS]"
_CALL_ID = "[CALL_ID]"
_MAX_NAME_LEN = 256
_NAME = re.compile(r"([\w.-]{1,256})(?:\[CALL_ID\][\w-]*)?\[ARGS\]\s*")


class MistralParser(ToolParser):
    """See ToolParser. Asks for calls the older way."""

    needs_special = True
    # Its templates refuse any other.
    id_len = 9

    @classmethod
    def opening(cls, name: str | None) -> str:
        """See ToolParser."""
        begun = f'{_OPEN} [{{"name": "'
        return begun if name is None else f'{begun[:-1]}{json.dumps(name)}, "arguments": '

    def _step(self, *, is_end: bool) -> bool:
        if not self._held.startswith(_OPEN):
            return self._find(_OPEN)
        if self._scan is None:
            return self._begin(is_end=is_end)
        end = self._scan.find(self._held)
        return end >= 0 and self._read(self._scan.start, end)

    def _begin(self, *, is_end: bool) -> bool:
        body = self._held[len(_OPEN) :].lstrip()
        if not body:
            return False
        start = len(self._held) - len(body)
        if body[0] == "[":
            self._scan = JsonEnd(start)
            return True
        named = _NAME.match(body)
        if named is not None and named.end() < len(body):
            if body[named.end()] != "{":
                return self._no_call(len(_OPEN))
            self._scan = JsonEnd(start + named.end())
            return True
        if named is None and (is_end or not _may_become_name(body)):
            return self._no_call(len(_OPEN))
        return False

    def _read(self, start: int, end: int) -> bool:
        value = loaded(self._held[start:end])
        before = self._held[len(_OPEN) : start].strip()
        calls = self._named(before, value) if before else self._listed(value)
        if not calls:
            return self._no_call(end)
        self._take(end)
        self._scan = None
        for call in calls:
            self._say_call(call)
        return True

    def _listed(self, value: object) -> list[Call]:
        """All of a list's calls, or none: what is no call must stay text."""
        items = value if isinstance(value, list) else []
        calls = [self._call_of(item, "arguments", "parameters") for item in items]
        sound = [call for call in calls if call is not None]
        return sound if len(sound) == len(calls) else []

    def _named(self, before: str, value: object) -> list[Call]:
        named = _NAME.match(before)
        call = self._call_of({"name": named and named.group(1), "arguments": value}, "arguments")
        return [] if call is None else [call]


class MistralArgsParser(MistralParser):
    """See ToolParser. Asks for calls the newer way."""

    @classmethod
    def opening(cls, name: str | None) -> str:
        """See ToolParser."""
        return _OPEN if name is None else f"{_OPEN}{name}{_ARGS}"


def _may_become_name(body: str) -> bool:
    """Whether more characters could make it match `_NAME`."""
    name, bracket, mark = body.partition("[")
    if not re.fullmatch(r"[\w.-]{1,256}", name):
        return False
    if not bracket:
        return True
    mark = bracket + mark
    if mark.startswith(_CALL_ID):
        given, bracket, rest = mark[len(_CALL_ID) :].partition("[")
        if len(given) > _MAX_NAME_LEN or (given and not re.fullmatch(r"[\w-]+", given)):
            return False
        return _ARGS.startswith(bracket + rest)
    return _CALL_ID.startswith(mark) or _ARGS.startswith(mark)
