"""The tokens that sim "generates": a pure function of all tokens before them.

A sequence has a 64-bit state, folded token by token; the state after the last
token picks the next one from a table of plain tokens. So the state of a position
is to sim what keys and values are to a model: it can be cached per position,
reused by prefix, and a wrongly shared block shows in the output.

The table holds no end token: sim generates until max_tokens or the context's
end, or until a token that the request itself calls a stop token.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from headrace.logprobs import TokenLogprobs
from headrace.models.gguf_file import GgufFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from headrace.models.files import ModelFiles
    from services.worker.model_config import ModelConfig

#: The state before the first token.
INITIAL_STATE = 0x9E3779B97F4A7C15

_MASK = (1 << 64) - 1
_MULTIPLIER = 0xD1342543DE82EF95
#: Fewer plain tokens than this, and any ordinary id is used.
_FEWEST_PLAIN = 16
#: How byte-level BPE and SentencePiece write a leading space.
_SPACES = ("Ġ", "▁")


def fold(state: int, tokens: Iterable[int]) -> list[int]:
    """The states after each of `tokens`, from `state` on."""
    states = []
    for token in tokens:
        state = (state ^ (token + 1)) * _MULTIPLIER & _MASK
        state ^= state >> 29
        states.append(state)
    return states


def choose(state: int, table: Sequence[int]) -> int:
    """The token that follows a sequence with `state`."""
    mixed = (state ^ (state >> 32)) * _MULTIPLIER & _MASK
    return table[(mixed >> 32) % len(table)]


def score(state: int, table: Sequence[int], count: int) -> TokenLogprobs:
    """Made-up log probabilities of the token that `choose` gives and of the `count` likeliest."""
    first = table.index(choose(state, table))
    top = [(table[(first + rank) % len(table)], -0.5 * (rank + 1)) for rank in range(count)]
    return TokenLogprobs((table[first], -0.5), top)


def next_token(tokens: Iterable[int], table: Sequence[int]) -> int:
    """The token that sim generates after `tokens`: the plain form, for checking outputs."""
    return choose(fold(INITIAL_STATE, tokens)[-1], table)


def plain_tokens(files: ModelFiles, config: ModelConfig) -> list[int]:
    """Ids of the vocabulary's ASCII words and word pieces: any of them in a row is clean text.

    Ids that end a sequence are left out. A vocabulary without such tokens, or a
    model without one, gives all other ids.
    """
    texts = _gguf_texts(files) if files.format == "gguf" else _huggingface_texts(files)
    ends = set(config.eos_token_ids)
    found = [token for token, text in texts if _is_plain(text) and token not in ends]
    found = sorted(token for token in found if token < config.vocab_size)
    if len(found) >= _FEWEST_PLAIN:
        return found
    return [token for token in range(config.vocab_size) if token not in ends]


def _is_plain(text: str) -> bool:
    body = text[1:] if text.startswith(_SPACES) else text
    return body.isascii() and body.isalpha()


def _gguf_texts(files: ModelFiles) -> Iterable[tuple[int, str]]:
    metadata = GgufFile(files.path).metadata
    texts = metadata.get("tokenizer.ggml.tokens", [])
    ordinary = 1
    kinds = metadata.get("tokenizer.ggml.token_type", [ordinary] * len(texts))
    return [
        (token, text)
        for token, (text, kind) in enumerate(zip(texts, kinds, strict=True))
        if kind == ordinary
    ]


def _huggingface_texts(files: ModelFiles) -> Iterable[tuple[int, str]]:
    path = files.path / "tokenizer.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    vocab = content.get("model", {}).get("vocab", {})
    added = {item["id"] for item in content.get("added_tokens", [])}
    pairs = (
        [(token, text) for text, token in vocab.items()]
        if isinstance(vocab, dict)
        else [(token, text) for token, (text, _) in enumerate(vocab)]
    )
    return [(token, text) for token, text in pairs if token not in added]
