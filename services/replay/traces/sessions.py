"""Conversations as JSON lines: every answer in one becomes a request with all before it as prompt.

    {"messages": [{"role": "system", "content": "…"}, …, {"role": "assistant", …}]}

What a turn shares with the turns before it, and with other conversations (a system
prompt), follows from the text itself. Text has no times and, without a tokenizer, no
lengths, so this much is assumed:

- a token is 4 characters, which is usual for English and code with vocabularies of
  50,000 to 150,000; a message has 4 tokens more, for role and separators;
- conversation k begins k × 2 s after the trace's start, or at its `timestamp` (ms);
- an answer takes 20 ms a token, and what comes before the next question (a tool, a
  person) 5 s.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.replay.traces.base import (
    MAX_ARRIVAL_MS,
    MAX_OUTPUT_TOKENS,
    MAX_PROMPT_TOKENS,
    Place,
    TraceOptions,
    collect,
    json_object,
    records,
    shown,
)
from services.replay.workload import Trace, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_SIZE = 64
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
SESSION_INTERVAL_MS = 2000.0
MS_PER_TOKEN = 20.0
PAUSE_MS = 5000.0


class Sessions:
    """See TraceReader. Conversations follow each other in the file, their turns overlap."""

    def recognizes(self, line: str) -> bool:
        """See TraceReader.recognizes."""
        return "messages" in json_object(line)

    def read(self, source: str, options: TraceOptions) -> Trace:
        """See TraceReader.read. The limit takes the first to arrive."""
        block_size = options.trace_block_size or BLOCK_SIZE
        whole = collect(source, _requests(Path(source), block_size), block_size=block_size, limit=0)
        return Trace(whole.requests[: options.limit or None], block_size)


def _requests(path: Path, block_size: int) -> Iterator[tuple[Place, TraceRequest]]:
    for number, (place, record) in enumerate(records(path)):
        start_ms = number * SESSION_INTERVAL_MS
        if "timestamp" in record:
            start_ms = float(place.number(record, "timestamp", least=0, most=MAX_ARRIVAL_MS))
        for request in _turns(place, record, f"{number}", start_ms, block_size):
            yield place, request


def _turns(
    place: Place, record: dict[str, Any], session_id: str, start_ms: float, block_size: int
) -> Iterator[TraceRequest]:
    messages = record.get("messages")
    if not isinstance(messages, list):
        place.refuse(f"messages must be a list, not {shown(messages)}")
    prompt = _Prompt(block_size * CHARACTERS_PER_TOKEN)
    arrival_ms = start_ms
    for position, message in enumerate(messages):
        role, content = _message(place, message, f"messages[{position}]")
        if role == "assistant" and position:
            output_tokens = max(1, -(-len(content) // CHARACTERS_PER_TOKEN))
            num_tokens = -(-prompt.num_characters // CHARACTERS_PER_TOKEN)
            for what, num, most in (
                ("the prompt", num_tokens, MAX_PROMPT_TOKENS),
                ("the answer", output_tokens, MAX_OUTPUT_TOKENS),
            ):
                if num > most:
                    place.refuse(f"messages[{position}]: {what} has {num:,} tokens, limit {most:,}")
            yield TraceRequest(
                arrival_ms=arrival_ms,
                num_tokens=num_tokens,
                output_tokens=output_tokens,
                hash_ids=tuple(prompt.hash_ids),
                session_id=session_id,
            )
            arrival_ms += output_tokens * MS_PER_TOKEN + PAUSE_MS
        prompt.append(role, content)


@dataclass
class _Prompt:
    """A conversation so far: as a template would write it, one id for each whole piece."""

    piece_len: int
    hash_ids: list[int] = field(default_factory=list)
    num_characters: int = 0
    _rest: str = ""
    _digest: bytes = b""

    def append(self, role: str, content: str) -> None:
        """Add a message."""
        # Four tokens' worth of separators, the role among them.
        head = f"<{role}>".ljust(TOKENS_PER_MESSAGE * CHARACTERS_PER_TOKEN)
        text = head[: TOKENS_PER_MESSAGE * CHARACTERS_PER_TOKEN] + content
        self.num_characters += len(text)
        self._rest += text
        while len(self._rest) >= self.piece_len:
            piece, self._rest = self._rest[: self.piece_len], self._rest[self.piece_len :]
            data = piece.encode("utf-8", "surrogatepass")
            self._digest = hashlib.blake2b(data, key=self._digest, digest_size=16).digest()
            self.hash_ids.append(int.from_bytes(self._digest[:8], "little") >> 1)


def _message(place: Place, message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        place.refuse(f"{where} must be an object, not {shown(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        place.refuse(f"{where}.role must be a string, not {shown(role)}")
    if not isinstance(content, str):
        place.refuse(f"{where}.content must be a string, not {shown(content)}")
    return role, content
