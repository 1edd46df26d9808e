"""Files of ranks: tiktoken's (lines of base64 and rank), and Mistral's tekken.json."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from services.tokenizer.backends.base import AddedToken, TokenizerSpec
from services.tokenizer.backends.pre_tokenizers import PRE_TOKENIZERS, from_pattern
from services.tokenizer.backends.sources import parts
from services.tokenizer.backends.sources.parts import byte_level, fail, ids_if

if TYPE_CHECKING:
    from pathlib import Path

#: A rank file names no pattern: those that tiktoken and Qwen have for theirs.
_PATTERN_OF = {
    "cl100k_base": "llama3",
    "o200k_base": "o200k",
    "gpt2": "gpt2",
    "r50k_base": "gpt2",
    "p50k_base": "gpt2",
    "qwen": "qwen2",
}
#: Names of the first special tokens, in files that don't list them (mistral-common).
_TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)  # fmt: skip
_NEVER = float("inf")


def read_ranks(path: Path) -> TokenizerSpec:
    """A tiktoken file. Raises StartupError naming file and fault."""
    source = f"tokenizer file {path}"
    if path.stem not in _PATTERN_OF:
        fail(source, f"its pattern is not known (those of {', '.join(_PATTERN_OF)} are)")
    rank_of: dict[int, str] = {}
    for line in path.read_bytes().splitlines():
        if line:
            token, _, rank = line.partition(b" ")
            rank_of[int(rank)] = byte_level(base64.b64decode(token, validate=True))
    named, config = parts.named_tokens(path.parent)
    added = [
        AddedToken(
            int(token_id),
            entry["content"],
            bool(entry.get("special")),
            single_word=bool(entry.get("single_word")),
            lstrip=bool(entry.get("lstrip")),
            rstrip=bool(entry.get("rstrip")),
        )
        for token_id, entry in config.get("added_tokens_decoder", {}).items()
    ]
    by_id = rank_of | {token.token_id: token.content for token in added}
    special = {token.token_id for token in added}
    if not by_id:
        fail(source, "it has no ranks")
    size = max(by_id) + 1
    id_of = {token.content: token.token_id for token in added}
    pre_tokenizer = PRE_TOKENIZERS[_PATTERN_OF[path.stem]]
    pre_tokenizer.compile()
    return TokenizerSpec(
        source=source,
        family="byte_level_bpe",
        tokens=[by_id.get(at, "") for at in range(size)],
        added=added,
        pre_tokenizer=pre_tokenizer,
        token_ranks=[
            float(at) if at in rank_of and at not in special else _NEVER for at in range(size)
        ],
        ignore_merges=True,
        eos_token_ids=parts.eos_ids(path.parent, id_of.get(named.get("eos_token", ""))),
        pad_id=id_of.get(named.get("pad_token", "")),
        **parts.chat_templates(path.parent, config),
        named_tokens=named,
    )


def read_tekken(path: Path) -> TokenizerSpec:
    """A tekken.json: special tokens first, then those of rank 0 and on.

    Raises StartupError naming file and fault.
    """
    source = f"tokenizer file {path}"
    content = parts.read_json(path)
    config = content["config"]
    num_special, size = config["default_num_special_tokens"], config["default_vocab_size"]
    special = _tekken_special(content.get("special_tokens"), num_special)
    vocab = content["vocab"][: size - num_special]
    if len(vocab) < size - num_special or any(e["rank"] != at for at, e in enumerate(vocab)):
        fail(source, "its vocabulary has gaps")
    tokens = special + [byte_level(base64.b64decode(entry["token_bytes"])) for entry in vocab]
    id_of = {token: at for at, token in enumerate(special)}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _, beside = parts.named_tokens(path.parent)
    return TokenizerSpec(
        source=source,
        family="byte_level_bpe",
        tokens=tokens,
        added=[AddedToken(at, token, is_special=True) for at, token in enumerate(special)],
        pre_tokenizer=from_pattern(config["pattern"], source),
        token_ranks=[_NEVER] * num_special + [float(at) for at in range(len(vocab))],
        ignore_merges=True,
        prefix_ids=ids_if(True, id_of.get("<s>")),
        eos_token_ids=parts.eos_ids(path.parent, id_of.get("</s>")),
        pad_id=id_of.get("<pad>"),
        **parts.chat_templates(path.parent, beside),
        named_tokens={name: text for name, text in named.items() if text in id_of},
    )


def _tekken_special(listed: Any, number: int) -> list[str]:
    names = dict(enumerate(_TEKKEN_SPECIAL))
    if listed is not None:
        names = {entry["rank"]: entry["token_str"] for entry in listed}
    return [names.get(at, f"<SPECIAL_{at}>") for at in range(number)]
