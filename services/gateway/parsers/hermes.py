"""Tool calls as Hermes and Qwen write them.

    <tool_call>
    {"name": "f", "arguments": {"x": 1}}
    </tool_call>

Several stand one after the other, text before and between them. The last may lack its
closing mark.
"""

from __future__ import annotations

import json

from services.gateway.parsers.base import JsonEnd, ToolParser, loaded

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"


class HermesParser(ToolParser):
    """See ToolParser."""

    @classmethod
    def opening(cls, name: str | None) -> str:
        """See ToolParser."""
        begun = f'{_OPEN}\n{{"name": "'
        return begun if name is None else f'{begun[:-1]}{json.dumps(name)}, "arguments": '

    def _step(self, *, is_end: bool) -> bool:
        if not self._held.startswith(_OPEN):
            return self._find(_OPEN)
        if self._scan is None:
            body = self._held[len(_OPEN) :].lstrip()
            if not body:
                return False
            if body[0] != "{":
                return self._no_call(len(_OPEN))
            self._scan = JsonEnd(len(self._held) - len(body))
        return self._read(self._scan, is_end=is_end)

    def _read(self, scan: JsonEnd, *, is_end: bool) -> bool:
        end = scan.find(self._held)
        if end < 0:
            return False
        rest = self._held[end:].lstrip()
        is_close = _CLOSE.startswith(rest) or rest.startswith(_CLOSE)
        if not is_end and is_close and len(rest) < len(_CLOSE):
            return False
        call = self._call_of(loaded(self._held[scan.start : end]), "arguments", "parameters")
        if call is None:
            return self._no_call(end)
        self._held = rest[len(_CLOSE) :] if is_close else self._held[end:]
        self._scan = None
        self._say_call(call)
        return True
