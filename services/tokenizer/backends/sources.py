"""What a model's files say about its tokenizer, as a TokenizerSpec.

Two formats: GGUF metadata (`tokenizer.*` keys) and Hugging Face's tokenizer.json
with tokenizer_config.json beside it. A component that is not known here is a
StartupError that names it: approximating one would give ids that are almost right.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from headrace.errors import StartupError
from headrace.models.gguf_file import GgufFile
from services.tokenizer.backends.base import AddedToken, TokenizerSpec
from services.tokenizer.backends.pre_tokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from headrace.models.files import ModelFiles

# tokenizer.ggml.token_type, as llama.cpp numbers it.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_GGUF_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_GGUF_EOS = ("eos_token_id", "eot_token_id", "eom_token_id")
_HF_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

#: Fields of a BPE model, and the values under which they change nothing.
_PLAIN_BPE: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
}


def read_spec(files: ModelFiles) -> TokenizerSpec:
    """The tokenizer of a model. Raises StartupError naming file and fault."""
    try:
        return _read_gguf(files.path) if files.format == "gguf" else _read_huggingface(files.path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StartupError(f"the tokenizer of {files.path} is malformed: {error!r}") from error


def _read_gguf(path: Path) -> TokenizerSpec:
    source = f"model file {path}"
    metadata = GgufFile(path).metadata

    def value(key: str, kind: type, default: Any = None) -> Any:
        found = metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(found, kind):
            _fail(source, f"tokenizer.ggml.{key} is {'missing' if found is None else 'malformed'}")
        return found

    model = value("model", str)
    if model != "gpt2":
        _fail(source, f"the tokenizer model {model!r} is not supported (gpt2 is)")
    pre = value("pre", str)
    known = {name: key for key, entry in PRE_TOKENIZERS.items() for name in entry.gguf}
    if pre not in known:
        _fail(source, f"the pre-tokenizer {pre!r} is not supported ({', '.join(known)} are)")
    tokens: list[str] = value("tokens", list)
    types: list[int] = value("token_type", list)
    if not all(isinstance(token, str) for token in tokens):
        _fail(source, "tokenizer.ggml.tokens is malformed")
    if len(types) != len(tokens):
        _fail(source, f"{len(tokens)} tokens have {len(types)} types")
    unknown = set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}
    if unknown:
        _fail(source, f"token types {sorted(unknown)} are not supported")
    ids = {
        key: metadata.get(f"tokenizer.ggml.{key}") for key in {*_GGUF_NAMED.values(), *_GGUF_EOS}
    }
    for key, token_id in ids.items():
        if token_id is not None and not (isinstance(token_id, int) and token_id < len(tokens)):
            _fail(source, f"tokenizer.ggml.{key} is {token_id!r}, of {len(tokens)} tokens")
    return TokenizerSpec(
        source=source,
        family="byte_level_bpe",
        pre_tokenizer=known[pre],
        tokens=tokens,
        merges=[_pair(merge, source) for merge in value("merges", list)],
        added=[
            AddedToken(at, tokens[at], kind == _CONTROL)
            for at, kind in enumerate(types)
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        prefix_ids=_if(value("add_bos_token", bool, False), ids["bos_token_id"]),
        suffix_ids=_if(value("add_eos_token", bool, False), ids["eos_token_id"]),
        eos_token_ids=tuple(dict.fromkeys(i for k in _GGUF_EOS if (i := ids[k]) is not None)),
        chat_template=metadata.get("tokenizer.chat_template"),
        named_tokens={n: tokens[i] for n, k in _GGUF_NAMED.items() if (i := ids[k]) is not None},
    )


def _read_huggingface(directory: Path) -> TokenizerSpec:
    path = directory / "tokenizer.json"
    source = f"tokenizer file {path}"
    content = _read_json(path)
    for part in ("normalizer", "truncation", "padding"):
        if content.get(part) is not None:
            _fail(source, f"the {part} {_name(content[part])} is not supported")
    post_processor, decoder = content.get("post_processor"), content.get("decoder")
    if post_processor is not None and post_processor["type"] != "ByteLevel":
        _fail(source, f"the post_processor {_name(post_processor)} is not supported")
    if decoder is None or decoder["type"] != "ByteLevel":
        _fail(source, f"the decoder {_name(decoder)} is not supported (ByteLevel is)")
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        _fail(source, f"the model {_name(model)} is not supported (BPE is)")
    for key, plain in _PLAIN_BPE.items():
        if model.get(key) not in plain:
            _fail(source, f"the BPE model's {key} {model[key]!r} is not supported")
    pre_tokenizer = _pre_tokenizer(content.get("pre_tokenizer"), source)
    config = _read_json(directory / "tokenizer_config.json", optional=True)
    added = [_added(entry, source) for entry in content.get("added_tokens", ())]
    id_of = {**model["vocab"], **{token.content: token.token_id for token in added}}
    tokens = [""] * (max(id_of.values(), default=-1) + 1)
    for token, token_id in id_of.items():
        tokens[token_id] = token
    named = {n: text for n in _HF_NAMED if (text := _token_text(config.get(n))) is not None}
    return TokenizerSpec(
        source=source,
        family="byte_level_bpe",
        pre_tokenizer=pre_tokenizer,
        tokens=tokens,
        merges=[_pair(merge, source) for merge in model["merges"]],
        added=added,
        ignore_merges=bool(model.get("ignore_merges")),
        eos_token_ids=_huggingface_eos(directory, id_of.get(named.get("eos_token", ""))),
        chat_template=_huggingface_template(directory, config),
        named_tokens=named,
    )


def _pre_tokenizer(component: Any, source: str) -> str:
    """The entry of PRE_TOKENIZERS that is this component of a tokenizer.json."""
    parts = [component]
    if component and component.get("type") == "Sequence":
        parts = component["pretokenizers"]
    essence = tuple(_essence(part) for part in parts)
    known = [name for name, entry in PRE_TOKENIZERS.items() if entry.huggingface == essence]
    if known:
        return known[0]
    return _fail(source, f"the pre_tokenizer {json.dumps(component)} is not supported")


def _essence(part: Any) -> Any:
    """A component without the options that change no ids at the values they have."""
    if (
        part is not None
        and part["type"] == "ByteLevel"
        and part.get("add_prefix_space", True) is False
        and part.get("use_regex", True) is True
    ):
        return {"type": "ByteLevel"}
    return part


def _added(entry: Mapping[str, Any], source: str) -> AddedToken:
    for option in ("single_word", "lstrip", "rstrip"):
        if entry.get(option):
            _fail(source, f"the added token {entry['content']!r} has {option}, not supported")
    return AddedToken(entry["id"], entry["content"], bool(entry.get("special")))


def _huggingface_eos(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    listed = _read_json(directory / "generation_config.json", optional=True).get("eos_token_id")
    ids = [eos_id, *(listed if isinstance(listed, list) else [listed])]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _huggingface_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _pair(merge: Any, source: str) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2:
        _fail(source, f"the merge {merge!r} is not a pair")
    return parts[0], parts[1]


def _if(wanted: bool, token_id: int | None) -> tuple[int, ...]:
    return (token_id,) if wanted and token_id is not None else ()


def _read_json(path: Path, *, optional: bool = False) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        if optional:
            return {}
        raise StartupError(f"there is no tokenizer file {path}") from None
    except (OSError, ValueError) as error:
        raise StartupError(f"can't read tokenizer file {path}: {error}") from error


def _name(component: Any) -> str:
    return (
        str(component.get("type") or component) if isinstance(component, dict) else str(component)
    )


def _fail(source: str, reason: str) -> NoReturn:
    raise StartupError(f"{source}: {reason}")
