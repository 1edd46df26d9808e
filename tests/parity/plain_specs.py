"""Specs of real vocabularies, read with no judgement: for what does not hang on reading files.

The normalizer and the words are the oracle's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from tokenizers import Tokenizer

from services.tokenizer.backends.base import AddedToken, TokenizerSpec
from services.tokenizer.backends.token_texts import (
    TokenTexts,
    byte_level_texts,
    sentencepiece_texts,
    wordpiece_texts,
)
from tests.vocabularies import folder

#: Vocabularies with a tokenizer.json.
NAMES = (
    "llama3", "llama3_1", "qwen3", "deepseek_v3", "deepseek_llm", "gpt4o", "gptoss", "whisper",
    "gemma3", "llama2", "e5", "minilm",
)  # fmt: skip

_TEXTS = {
    "byte_level_bpe": byte_level_texts,
    "sentencepiece_bpe": sentencepiece_texts,
    "unigram": sentencepiece_texts,
    "wordpiece": wordpiece_texts,
}


@cache
def oracle_of(name: str) -> Tokenizer:
    oracle = Tokenizer.from_file(str(folder(name) / "tokenizer.json"))
    oracle.no_padding()
    oracle.no_truncation()
    return oracle


@cache
def spec_of(name: str) -> TokenizerSpec:
    content = json.loads((folder(name) / "tokenizer.json").read_bytes())
    model, oracle = content["model"], oracle_of(name)
    vocab = model["vocab"]
    if isinstance(vocab, list):
        vocab = {token: at for at, (token, _) in enumerate(vocab)}
    added = [_added(entry) for entry in content["added_tokens"]]
    vocab = {**vocab, **{token.content: token.token_id for token in added}}
    tokens = [""] * (max(vocab.values()) + 1)
    for token, token_id in vocab.items():
        tokens[token_id] = token
    byte_fallback = bool(model.get("byte_fallback"))
    bpe = "sentencepiece_bpe" if byte_fallback else "byte_level_bpe"
    metaspace = content["decoder"]["type"] == "Metaspace"
    return TokenizerSpec(
        source=name,
        family={"BPE": bpe, "Unigram": "unigram", "WordPiece": "wordpiece"}[model["type"]],
        tokens=tokens,
        added=added,
        normalizer=oracle.normalizer.normalize_str if oracle.normalizer else None,
        pre_tokenizer=_Words(oracle.pre_tokenizer),
        prepend_space="always" if metaspace else "never",
        unk_id=model.get("unk_id", vocab.get(model.get("unk_token"))),
        byte_fallback=byte_fallback,
        fuse_unk=bool(model.get("fuse_unk")),
        strips_first_space=metaspace or "Strip" in json.dumps(content["decoder"]),
    )


@cache
def texts_of(name: str) -> TokenTexts:
    spec = spec_of(name)
    return _TEXTS[spec.family](spec)


def _added(entry: dict[str, Any]) -> AddedToken:
    flags = {name: entry[name] for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(entry["id"], entry["content"], entry["special"], **flags)


class _Words:
    def __init__(self, pre_tokenizer: Any) -> None:
        self._pre_tokenizer = pre_tokenizer

    def words(self, text: str) -> Iterator[list[str]]:
        yield [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)]
