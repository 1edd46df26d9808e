"""Log probabilities of tokens, from packed records to the forms that clients parse. Pure.

A chat's form has each token's text and bytes; a completion's has parallel lists, in
which a token that is no whole character is written `bytes:\\xe2\\x80`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.logprobs import unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace.logprobs import TokenLogprobs
    from services.gateway.generation import Vocabulary

#: JSON has no infinity: what can't be is this.
LEAST = -9999.0


def chat_entries(data: bytes, count: int, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The elements of `logprobs.content` for packed records with the `count` likeliest."""
    return [
        _entry(*record.chosen, vocabulary)
        | {"top_logprobs": [_entry(*top, vocabulary) for top in record.top]}
        for record in unpack(data, count)
    ]


def _entry(token_id: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    spelled = vocabulary.spelled(token_id)
    return {
        "token": spelled.decode("utf-8", "replace"),
        "logprob": max(logprob, LEAST),
        "bytes": list(spelled),
    }


class CompletionLogprobs:
    """A completion's `logprobs` as it grows. `text_offset` counts the characters of the tokens
    before, from the beginning of what is shown."""

    def __init__(self, vocabulary: Vocabulary, count: int) -> None:
        self._vocabulary = vocabulary
        self._count = count
        self._bytes = bytearray()
        self._num_chars = 0

    def first(self, token_id: int) -> dict[str, list[Any]]:
        """A prompt's first token, which has no probability."""
        return self._lists([token_id], [None])

    def prompt(self, data: bytes, count: int) -> dict[str, list[Any]]:
        """The prompt's next tokens, from packed records with the `count` likeliest."""
        records = unpack(data, count)
        return self._lists([record.chosen[0] for record in records], records)

    def push(self, data: bytes) -> dict[str, list[Any]]:
        """The next generated tokens, from packed records."""
        records = unpack(data, self._count)
        return self._lists([record.chosen[0] for record in records], records)

    def _lists(
        self, ids: Sequence[int], records: Sequence[TokenLogprobs | None]
    ) -> dict[str, list[Any]]:
        lists: dict[str, list[Any]] = {
            "text_offset": [], "tokens": [], "token_logprobs": [], "top_logprobs": []
        }  # fmt: skip
        for token_id, record in zip(ids, records, strict=True):
            lists["text_offset"].append(self._offset(token_id))
            lists["tokens"].append(self._name(token_id))
            lists["token_logprobs"].append(record and max(record.chosen[1], LEAST))
            lists["top_logprobs"].append(record and self._top(record))
        return lists

    def _top(self, record: TokenLogprobs) -> dict[str, float]:
        # As OpenAI does it, the token itself is among them even if it is no likely one.
        entries = [*record.top[: self._count], record.chosen]
        return {self._name(token): max(logprob, LEAST) for token, logprob in entries}

    def _offset(self, token_id: int) -> int:
        before = self._num_chars
        self._bytes += self._vocabulary.spelled(token_id)
        text = self._bytes.decode("utf-8", "ignore")
        if text:
            self._num_chars += len(text)
            del self._bytes[: len(text.encode())]
        if len(self._bytes) > _MAX_CHAR_LEN:
            self._bytes.clear()
        return before

    def _name(self, token_id: int) -> str:
        spelled = self._vocabulary.spelled(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


_MAX_CHAR_LEN = 4


def joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """What `CompletionLogprobs` gave, one after the other."""
    names = ("text_offset", "tokens", "token_logprobs", "top_logprobs")
    return {name: [item for part in parts for item in part[name]] for name in names}


def prompt_entries(
    data: bytes, count: int, vocabulary: Vocabulary
) -> list[dict[str, dict[str, Any]] | None]:
    """`prompt_logprobs` as vLLM writes them: by token id; the first token has none. A token that
    is not among the likeliest has no rank."""
    entries: list[dict[str, dict[str, Any]] | None] = [None]
    for record in unpack(data, count):
        by_id = {record.chosen[0]: (record.chosen[1], None)} | {
            token: (logprob, rank) for rank, (token, logprob) in enumerate(record.top, 1)
        }
        entries.append(
            {
                str(token): {
                    "logprob": max(logprob, LEAST),
                    "rank": rank,
                    "decoded_token": vocabulary.spelled(token).decode("utf-8", "replace"),
                }
                for token, (logprob, rank) in by_id.items()
            }
        )
    return entries
