"""Tool calls as Llama 3 writes them: an answer that is JSON and nothing else.

    {"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}

`<|python_tag|>` may stand before it. An answer that begins otherwise is text.
"""

from __future__ import annotations

import json

from services.gateway.parsers.base import JsonEnd, ToolParser, loaded

_TAG = "<|python_tag|>"


class LlamaJsonParser(ToolParser):
    """See ToolParser."""

    _is_text = False

    @classmethod
    def opening(cls, name: str | None) -> str:
        """See ToolParser."""
        begun = '{"name": "'
        return begun if name is None else f'{begun[:-1]}{json.dumps(name)}, "parameters": '

    def _step(self, *, is_end: bool) -> bool:
        if self._is_text:
            self._say_text(self._take(len(self._held)))
            return False
        if self._scan is not None:
            return self._read(self._scan)
        body = self._held.lstrip()
        if body.startswith(";") and self._after_call:
            body = body[1:].lstrip()
        elif body.startswith(_TAG):
            body = body.removeprefix(_TAG).lstrip()
        elif _TAG.startswith(body) and not is_end:
            return False
        if not body:
            return False
        if body[0] != "{":
            return self._be_text()
        self._scan = JsonEnd(len(self._held) - len(body))
        return True

    def _read(self, scan: JsonEnd) -> bool:
        end = scan.find(self._held)
        if end < 0:
            return False
        call = self._call_of(loaded(self._held[scan.start : end]), "parameters", "arguments")
        if call is None:
            return self._be_text()
        self._take(end)
        self._scan = None
        self._say_call(call)
        return True

    def _be_text(self) -> bool:
        """From here on all is text."""
        self._is_text = True
        return self._no_call(len(self._held))
