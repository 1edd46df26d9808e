"""Hugging Face's tokenizer.json, with tokenizer_config.json and others beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from services.tokenizer.backends.base import AddedToken, TokenizerSpec
from services.tokenizer.backends.normalizers import from_component as normalizer_of
from services.tokenizer.backends.pre_tokenizers import from_components
from services.tokenizer.backends.sources import parts
from services.tokenizer.backends.sources.parts import fail

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from services.tokenizer.backends.base import Side

_META = "\u2581"
_ESCAPES = {"type": "Replace", "pattern": {"String": " "}, "content": _META}
_UNESCAPES = {"type": "Replace", "pattern": {"String": _META}, "content": " "}
_STRIPS = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

#: Fields of models, and the values under which they change nothing.
_PLAIN: dict[str, dict[str, tuple[Any, ...]]] = {
    "BPE": {
        "dropout": (None, 0.0),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
    },
    "Unigram": {},
    "WordPiece": {},
}


def read_huggingface(directory: Path) -> TokenizerSpec:
    """Raises StartupError naming file and fault."""
    path = directory / "tokenizer.json"
    source = f"tokenizer file {path}"
    content = parts.read_json(path)
    model = content.get("model") or {}
    kind = model.get("type")
    if kind not in _PLAIN:
        fail(source, f"the model {_name(model)} is not supported ({', '.join(_PLAIN)} are)")
    for key, plain in _PLAIN[kind].items():
        if model.get(key) not in plain:
            fail(source, f"the {kind} model's {key} {model[key]!r} is not supported")
    id_of, fields = _model(model, source)
    added = [_added(entry, id_of) for entry in content.get("added_tokens", ())]
    id_of |= {token.content: token.token_id for token in added}
    tokens = [""] * (max(id_of.values(), default=-1) + 1)
    for token, token_id in id_of.items():
        tokens[token_id] = token
    fields |= _cutting(content, fields, source)
    fields |= _decoding(content.get("decoder"), fields["family"], source)
    prefix_ids, suffix_ids = _around(content.get("post_processor"), source)
    named, config = parts.named_tokens(directory)
    return TokenizerSpec(
        source=source,
        tokens=tokens,
        added=added,
        normalizer=normalizer_of(content.get("normalizer"), source),
        has_local_chunks=_has_local_chunks(content),
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        eos_token_ids=parts.eos_ids(directory, id_of.get(named.get("eos_token", ""))),
        **parts.chat_templates(directory, config),
        named_tokens=named,
        **_sides(content, config, id_of.get(named.get("pad_token", ""))),
        **fields,
    )


def _model(model: Mapping[str, Any], source: str) -> tuple[dict[str, int], dict[str, Any]]:
    """The vocabulary, and the spec's fields that the model decides."""
    if model["type"] == "Unigram":
        return {token: at for at, (token, _) in enumerate(model["vocab"])}, {
            "family": "unigram",
            "scores": [score for _, score in model["vocab"]],
            "unk_id": model.get("unk_id"),
            "byte_fallback": bool(model.get("byte_fallback")),
            "fuse_unk": True,
        }
    id_of = dict(model["vocab"])
    unk = model.get("unk_token")
    if unk is not None and unk not in id_of:
        fail(source, f"the unk_token {unk!r} is not in the vocabulary")
    fields: dict[str, Any] = {"unk_id": id_of.get(unk)}
    if model["type"] == "WordPiece":
        return id_of, fields | {
            "family": "wordpiece",
            "continuing_prefix": model.get("continuing_subword_prefix", "##"),
            "max_word_len": model.get("max_input_chars_per_word", 100),
        }
    return id_of, fields | {
        "family": "sentencepiece_bpe",
        "merges": [parts.pair_of(merge, source) for merge in model["merges"]],
        "ignore_merges": bool(model.get("ignore_merges")),
        "byte_fallback": bool(model.get("byte_fallback")),
        "fuse_unk": bool(model.get("fuse_unk")),
    }


def _cutting(content: Mapping[str, Any], fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Pre-tokenizer, what goes before the text, and whether bytes are spelled out."""
    component = content.get("pre_tokenizer")
    components = [] if component is None else _flat(component, "pretokenizers")
    kinds = [part.get("type") for part in components]
    found: dict[str, Any] = {}
    if fields["family"] == "sentencepiece_bpe" and "ByteLevel" in kinds:
        if fields["byte_fallback"] or fields["fuse_unk"]:
            fail(source, "byte_fallback and fuse_unk are not supported with a ByteLevel")
        found["family"] = "byte_level_bpe"
    if _escapes(content.get("normalizer")):
        # Nothing is left that it could cut at.
        components = [part for part in components if not _cuts_spaces(part)]
    components, found["prepend_space"] = _prepending(components, source)
    if components:
        found["pre_tokenizer"] = from_components(components, source)
    elif fields["family"] == "wordpiece":
        fail(source, "a WordPiece model without a pre_tokenizer is not supported")
    return found


def _prepending(
    components: list[dict[str, Any]], source: str
) -> tuple[list[dict[str, Any]], Literal["never", "first", "always"]]:
    prepend: Literal["never", "first", "always"] = "never"
    kept = []
    for at, part in enumerate(components):
        scheme = "never"
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space", True):
            scheme = "always"
        elif part.get("type") == "Metaspace" and part.get("add_prefix_space", True):
            scheme = part.get("prepend_scheme", "always")
        if scheme not in ("never", "first", "always"):
            fail(source, f"the prepend_scheme {scheme!r} is not supported")
        if scheme != "never" and at == 0:
            prepend = cast("Literal['first', 'always']", scheme)
        elif scheme == "always" and part["type"] == "Metaspace" and _splits_words(components[:at]):
            part = {**part, "each_word": True}
        elif scheme != "never":
            fail(source, f"the pre_tokenizer {part} adds a space behind others: not supported")
        kept.append(part)
    return kept, prepend


def _splits_words(components: list[dict[str, Any]]) -> bool:
    return [part.get("type") for part in components] == ["WhitespaceSplit"]


def _escapes(normalizer: Any) -> bool:
    return normalizer is not None and _ESCAPES in _flat(normalizer, "normalizers")


def _cuts_spaces(component: dict[str, Any]) -> bool:
    return (
        component.get("type") == "Split"
        and component.get("pattern") == {"String": " "}
        and (not component.get("invert"))
    )


def _flat(component: dict[str, Any], key: str) -> list[dict[str, Any]]:
    if component.get("type") != "Sequence":
        return [component]
    return [part for nested in component[key] for part in _flat(nested, key)]


def _has_local_chunks(content: Mapping[str, Any]) -> bool:
    """See TokenizerSpec: BERT's, and those of XLM-R's kind, whose runs of spaces are joined."""
    normalizer, pre_tokenizer = content.get("normalizer"), content.get("pre_tokenizer")
    if normalizer is None or pre_tokenizer is None:
        return False
    normalizers = _flat(normalizer, "normalizers")
    kinds = [part.get("type") for part in normalizers]
    cutters = [part.get("type") for part in _flat(pre_tokenizer, "pretokenizers")]
    if kinds == ["BertNormalizer"]:
        return cutters == ["BertPreTokenizer"]
    return (
        kinds == ["Precompiled", "Replace"]
        and normalizers[1] == {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        and cutters == ["Metaspace"]
        and pre_tokenizer.get("split", True)
    )


def _decoding(decoder: Any, family: str, source: str) -> dict[str, Any]:
    """What the decoder decides. It must be the family's own."""
    steps = [] if decoder is None else _flat(decoder, "decoders")
    kinds = [step.get("type") for step in steps]
    if family == "byte_level_bpe" and kinds == ["ByteLevel"]:
        return {}
    if family == "wordpiece" and kinds == ["WordPiece"]:
        return {"cleans_up": steps[0].get("cleanup", True)}
    if family in ("sentencepiece_bpe", "unigram"):
        if kinds == ["Metaspace"] and steps[0].get("replacement", _META) == _META:
            adds = steps[0].get("add_prefix_space", True)
            return {"strips_first_space": adds and steps[0].get("prepend_scheme") != "never"}
        fuses = [_UNESCAPES, {"type": "ByteFallback"}, {"type": "Fuse"}]
        if steps in (fuses, [*fuses, _STRIPS]):
            return {"strips_first_space": len(steps) > len(fuses)}
    return fail(source, f"the decoder {decoder} is not supported with {family}")


def _around(processor: Any, source: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and behind a text."""
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    for step in [] if processor is None else _flat(processor, "processors"):
        kind = step.get("type")
        if kind in ("BertProcessing", "RobertaProcessing"):
            before, behind = (step["cls"][1], *before), (*behind, step["sep"][1])
        elif kind == "TemplateProcessing":
            left, right = _template(step, source)
            before, behind = (*left, *before), (*behind, *right)
        elif kind != "ByteLevel":
            fail(source, f"the post_processor {_name(step)} is not supported")
    return before, behind


def _template(step: Mapping[str, Any], source: str) -> tuple[list[int], list[int]]:
    sides: list[list[int]] = [[]]
    for item in step["single"]:
        if "SpecialToken" in item:
            sides[-1] += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        else:
            sides.append([])
    if len(sides) != 2:
        fail(source, "the post_processor TemplateProcessing does not have the text once")
    return sides[0], sides[1]


def _sides(
    content: Mapping[str, Any], config: Mapping[str, Any], pad_id: int | None
) -> dict[str, Any]:
    truncation, padding = content.get("truncation") or {}, content.get("padding") or {}
    sides: dict[str, Side] = {
        "truncation_side": config.get("truncation_side") or _side(truncation),
        "padding_side": config.get("padding_side") or _side(padding),
    }
    for name, side in sides.items():
        if side not in ("left", "right"):
            raise ValueError(f"{name} is {side!r}")
    return {**sides, "pad_id": padding.get("pad_id", pad_id)}


def _side(part: Mapping[str, Any]) -> Side:
    return cast("Side", str(part.get("direction", "Right")).lower())


def _added(entry: Mapping[str, Any], id_of: Mapping[str, int]) -> AddedToken:
    return AddedToken(
        # The model's own id is what `tokenizers` takes.
        id_of.get(entry["content"], entry["id"]),
        entry["content"],
        bool(entry.get("special")),
        single_word=bool(entry.get("single_word")),
        lstrip=bool(entry.get("lstrip")),
        rstrip=bool(entry.get("rstrip")),
        normalized=bool(entry.get("normalized")),
    )


def _name(component: Any) -> str:
    return str((isinstance(component, dict) and component.get("type")) or component)
