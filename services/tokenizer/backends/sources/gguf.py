"""GGUF metadata (`tokenizer.*` keys), of llama.cpp's kinds of vocabularies.

GGUF names a pre-tokenizer, but no normalizer: it is what the models of that name
have in their tokenizer.json.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from headrace.models.gguf_file import GgufFile
from services.tokenizer.backends.base import AddedToken, TokenizerSpec
from services.tokenizer.backends.charsmap import read_charsmap
from services.tokenizer.backends.normalizers import SentencePiece, bert, normalize
from services.tokenizer.backends.pre_tokenizers import PRE_TOKENIZERS, from_components
from services.tokenizer.backends.pre_tokenizers.components import GGUF_COMPONENTS
from services.tokenizer.backends.sources.parts import fail, ids_if, pair_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from services.tokenizer.backends.base import Words

_META = "\u2581"
# tokenizer.ggml.token_type, as llama.cpp numbers it.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_TYPES = {
    "gpt2": {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED},
    "llama": {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE},
    "t5": {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE},
    "bert": {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED},
}
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "sep_token": "seperator_token_id",
    "mask_token": "mask_token_id",
}
_EOS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NFC = frozenset({"qwen2", "mpt", "command-r"})
#: Words that are tokens become them, and a text begins with BOS unless told otherwise.
_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})


def read_gguf(path: Path) -> TokenizerSpec:
    """Raises StartupError naming file and fault."""
    return _Reader(path).spec()


class _Reader:
    def __init__(self, path: Path) -> None:
        self._source = f"model file {path}"
        self._metadata = GgufFile(path).metadata
        self._model: str = self._value("model", str)
        if self._model not in _TYPES:
            fail(
                self._source,
                f"the tokenizer model {self._model!r} is not supported ({', '.join(_TYPES)} are)",
            )
        self._tokens: list[str] = self._value("tokens", list)
        self._types: list[int] = self._value("token_type", list)
        self._check_tokens()
        self._ids = {key: self._id(key) for key in (*_NAMED.values(), *_EOS)}

    def spec(self) -> TokenizerSpec:
        kinds = {"gpt2": self._gpt2, "llama": self._llama, "t5": self._t5, "bert": self._bert}
        fields = kinds[self._model]()
        unk_id = self._ids["unknown_token_id"]
        return TokenizerSpec(
            **{
                "source": self._source,
                "tokens": self._tokens,
                "added": self._added(),
                "unk_id": unk_id,
                "eos_token_ids": tuple(
                    dict.fromkeys(i for k in _EOS if (i := self._ids[k]) is not None)
                ),
                "pad_id": self._ids["padding_token_id"],
                "chat_template": self._metadata.get("tokenizer.chat_template"),
                "tool_template": self._metadata.get("tokenizer.chat_template.tool_use"),
                "named_tokens": {
                    name: self._tokens[i]
                    for name, key in _NAMED.items()
                    if (i := self._ids[key]) is not None
                },
                **fields,
            }
        )

    def _gpt2(self) -> dict[str, Any]:
        pre = self._value("pre", str)
        starts = pre in _WHOLE_WORDS
        return {
            "family": "byte_level_bpe",
            "normalizer": partial(normalize, "NFC") if pre in _NFC else None,
            "pre_tokenizer": self._pre_tokenizer(pre),
            "merges": [pair_of(merge, self._source) for merge in self._value("merges", list)],
            "ignore_merges": starts,
            "unk_id": None,
            **self._around(adds_bos=starts, adds_eos=False),
        }

    def _llama(self) -> dict[str, Any]:
        adds_prefix = self._value("add_space_prefix", bool, True)
        return {
            "family": "sentencepiece_bpe",
            "normalizer": SentencePiece({}, adds_prefix=adds_prefix, removes_spaces=False),
            "token_ranks": [-score for score in self._scores()],
            "byte_fallback": True,
            "strips_first_space": adds_prefix,
            **self._around(adds_bos=True, adds_eos=False),
        }

    def _t5(self) -> dict[str, Any]:
        adds_prefix = self._value("add_space_prefix", bool, True)
        symbols = [t for t, k in zip(self._tokens, self._types, strict=True) if k == _USER_DEFINED]
        charsmap = bytes(i & 0xFF for i in self._value("precompiled_charsmap", list, []))
        return {
            "family": "unigram",
            "normalizer": SentencePiece(
                read_charsmap(charsmap, self._source),
                symbols,
                adds_prefix=adds_prefix,
                removes_spaces=self._value("remove_extra_whitespaces", bool, False),
            ),
            "scores": self._scores(),
            "fuse_unk": True,
            "byte_fallback": _BYTE in self._types,
            "strips_first_space": adds_prefix,
            **self._around(adds_bos=False, adds_eos=True),
        }

    def _bert(self) -> dict[str, Any]:
        starts, ends = self._ids["cls_token_id"], self._ids["seperator_token_id"]
        return {
            "family": "wordpiece",
            "tokens": [
                token if kind != _NORMAL else _wordpiece(token)
                for token, kind in zip(self._tokens, self._types, strict=True)
            ],
            "normalizer": bert({}),
            "has_local_chunks": True,
            "pre_tokenizer": from_components([{"type": "BertPreTokenizer"}], self._source),
            "prefix_ids": ids_if(self._value("add_bos_token", bool, True), starts),
            "suffix_ids": ids_if(self._value("add_eos_token", bool, True), ends),
        }

    def _pre_tokenizer(self, pre: str) -> Words:
        known = {name: entry for entry in PRE_TOKENIZERS.values() for name in entry.gguf}
        if pre in known:
            known[pre].compile()
            return known[pre]
        if pre in GGUF_COMPONENTS:
            return from_components(GGUF_COMPONENTS[pre], self._source)
        names = ", ".join([*known, *GGUF_COMPONENTS])
        return fail(self._source, f"the pre-tokenizer {pre!r} is not supported ({names} are)")

    def _around(self, *, adds_bos: bool, adds_eos: bool) -> dict[str, tuple[int, ...]]:
        return {
            "prefix_ids": ids_if(
                self._value("add_bos_token", bool, adds_bos), self._ids["bos_token_id"]
            ),
            "suffix_ids": ids_if(
                self._value("add_eos_token", bool, adds_eos), self._ids["eos_token_id"]
            ),
        }

    def _added(self) -> Sequence[AddedToken]:
        # SentencePiece knows its symbols in the text that it made, not in ours.
        normalized = self._model == "t5"
        return [
            AddedToken(
                at,
                self._tokens[at],
                kind != _USER_DEFINED,
                normalized=normalized and kind == _USER_DEFINED,
            )
            for at, kind in enumerate(self._types)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]

    def _scores(self) -> list[float]:
        scores: list[float] = self._value("scores", list)
        if len(scores) != len(self._tokens):
            fail(self._source, f"{len(self._tokens)} tokens have {len(scores)} scores")
        return scores

    def _check_tokens(self) -> None:
        if not all(isinstance(token, str) for token in self._tokens):
            fail(self._source, "tokenizer.ggml.tokens is malformed")
        if len(self._types) != len(self._tokens):
            fail(self._source, f"{len(self._tokens)} tokens have {len(self._types)} types")
        unknown = set(self._types) - _TYPES[self._model]
        if unknown:
            fail(self._source, f"token types {sorted(unknown)} are not supported")

    def _id(self, key: str) -> int | None:
        found = self._metadata.get(f"tokenizer.ggml.{key}")
        if found is not None and not (isinstance(found, int) and found < len(self._tokens)):
            fail(self._source, f"tokenizer.ggml.{key} is {found!r}, of {len(self._tokens)} tokens")
        return found

    def _value(self, key: str, kind: type, default: Any = None) -> Any:
        found = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(found, kind):
            why = "missing" if found is None else "malformed"
            fail(self._source, f"tokenizer.ggml.{key} is {why}")
        return found


def _wordpiece(token: str) -> str:
    """llama.cpp marks what begins a word; BERT what does not."""
    if token.startswith(_META):
        return token[1:]
    return token if token.startswith("[") and token.endswith("]") else f"##{token}"
