"""What a model is, for people: read from its own header or config, no tensors loaded."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.errors import StartupError
from headrace.models import store
from headrace.models.catalog import CATALOG
from headrace.models.gguf_file import GgufFile

if TYPE_CHECKING:
    from pathlib import Path

    from headrace.models.files import ModelFiles

UNKNOWN = "not stated"
#: Bytes of one element in a safetensors file.
_SAFETENSORS_HEADER_LEN = 8
_MAX_HEADER_LEN = 100 << 20


@dataclass(frozen=True, slots=True)
class Description:
    """`size` in bytes, `context_len` in tokens, 0 where unknown; the rest is text."""

    name: str
    path: str
    architecture: str
    parameters: int
    size: int
    quantization: str
    context_len: int
    tokenizer: str
    licence: str
    revision: str
    source: str


def describe(model: ModelFiles) -> Description:
    """Raises StartupError, naming file and fault, for files that can't be read."""
    facts = _gguf(model.path) if model.format == "gguf" else _huggingface(model.path)
    manifest = store.read_manifest(model)
    known = CATALOG.get(model.name)
    stated = manifest.licence if manifest else known.licence if known else ""
    return Description(
        name=model.name,
        path=str(model.path),
        architecture=facts.architecture,
        parameters=sum(facts.elements.values()),
        size=store.installed_size(model.path),
        quantization=_shares(facts.elements),
        context_len=facts.context_len,
        tokenizer=facts.tokenizer,
        licence=stated or facts.licence or UNKNOWN,
        revision=model.revision(),
        source=manifest.source if manifest else UNKNOWN,
    )


@dataclass(frozen=True, slots=True)
class _Facts:
    architecture: str
    context_len: int
    tokenizer: str
    licence: str
    #: Number of elements of each tensor type.
    elements: Counter[str]


def _gguf(path: Path) -> _Facts:
    file = GgufFile(path)
    meta = file.metadata
    architecture = str(meta.get("general.architecture", UNKNOWN))
    elements: Counter[str] = Counter()
    for entry in file.tensors.values():
        elements[entry.type_name] += math.prod(entry.shape)
    tokens = meta.get("tokenizer.ggml.tokens", ())
    pre = meta.get("tokenizer.ggml.pre")
    kind = meta.get("tokenizer.ggml.model", UNKNOWN) + (f" ({pre})" if pre else "")
    return _Facts(
        architecture,
        int(meta.get(f"{architecture}.context_length", 0)),
        f"{kind}, {len(tokens):,} tokens",
        str(meta.get("general.license", "")),
        elements,
    )


def _huggingface(folder: Path) -> _Facts:
    outer = _json(folder / "config.json")
    # Of a model that takes images too, the language model.
    config = outer | dict(outer.get("text_config") or {})
    elements: Counter[str] = Counter()
    for weights in sorted(folder.glob("*.safetensors")):
        for name, entry in _safetensors_header(weights).items():
            if name != "__metadata__":
                elements[str(entry["dtype"])] += math.prod(entry["shape"])
    tokenizer = folder / "tokenizer.json"
    kind = UNKNOWN
    if tokenizer.exists():
        kind = str(_json(tokenizer).get("model", {}).get("type", UNKNOWN))
    return _Facts(
        str(outer.get("model_type", UNKNOWN)),
        int(config.get("max_position_embeddings", 0)),
        f"{kind}, {int(config.get('vocab_size', 0)):,} tokens",
        "",
        elements,
    )


def _safetensors_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_SAFETENSORS_HEADER_LEN), "little")
            if length > _MAX_HEADER_LEN:
                raise ValueError(f"a header of {length} bytes")
            return dict(json.loads(file.read(length)))
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} is no readable safetensors file: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StartupError(f"can't read {path}: {error}") from error


def _shares(elements: Counter[str]) -> str:
    """`Q4_1 79 %, Q8_0 21 %`: the types by their share of the parameters."""
    total = sum(elements.values())
    if not total:
        return UNKNOWN
    parts = [f"{kind} {100 * n / total:.0f} %" for kind, n in elements.most_common()]
    return ", ".join(part.replace(" 0 %", " <1 %") for part in parts)
