"""A model on disk: which files it is, and the digests that identify it.

A model is one GGUF file, or a directory as Hugging Face lays it out
(config.json, tokenizer files, *.safetensors). It knows no tensors and no network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from headrace.errors import StartupError
from headrace.models.gguf_file import GgufFile

Format = Literal["gguf", "huggingface"]

#: The files of a Hugging Face directory that decide what text becomes.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "vocab.txt",
    "generation_config.json",
    "tekken.json",
)
#: SentencePiece's files, Mistral's version behind the suffix, and tiktoken's.
_TOKENIZER_SUFFIX = re.compile(r"\.(?:model(?:\.v\d+\w*)?|tiktoken)")
_TEKKEN = re.compile(r"tekken\w*\.json")
#: What has a tokenizer by itself, the first that is there.
_WHOLE_TOKENIZERS = ("tokenizer.json", "tekken.json", "tokenizer.model")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_SAMPLES = 64
_SAMPLE_LEN = 4096


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One model: its name in the mesh, and its GGUF file or its directory."""

    name: str
    format: Format
    path: Path

    def revision(self) -> str:
        """A digest of config and weights that hosts with the same files agree on.

        Weights are sampled, so that it takes milliseconds for any size: names,
        sizes and 64 pieces of 4 KiB of each file.
        """
        state = blake2b(digest_size=16, person=b"headrace-rev")
        for path in self._content_files():
            size = path.stat().st_size
            state.update(f"{path.suffix}:{size}\0".encode())
            with path.open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_LEN) * sample // (_SAMPLES - 1))
                    state.update(file.read(_SAMPLE_LEN))
        return state.hexdigest()

    def tokenizer_digest(self) -> str:
        """A digest of all that decides which ids a text becomes, and its chat template."""
        state = blake2b(digest_size=16, person=b"headrace-tok")
        if self.format == "gguf":
            gguf = GgufFile(self.path)
            for key in sorted(k for k in gguf.metadata if k.startswith("tokenizer.")):
                state.update(key.encode() + b"\0" + gguf.raw_value(key))
        else:
            directory = self.path.parent if self.path.is_file() else self.path
            names = [*TOKENIZER_FILES]
            if self.path.is_file():
                names = [self.path.name, *(n for n in names if n not in _WHOLE_TOKENIZERS)]
            elif not any((directory / name).exists() for name in _WHOLE_TOKENIZERS):
                names += [path.name for path in sorted(directory.iterdir()) if _is_tokenizer(path)]
            for name in dict.fromkeys(names):
                if (directory / name).exists():
                    state.update(name.encode() + b"\0" + (directory / name).read_bytes())
        return state.hexdigest()

    def _content_files(self) -> list[Path]:
        if self.format == "gguf":
            return [self.path]
        if self.path.is_file() or not (self.path / "config.json").exists():
            return [tokenizer_file(self.path)]
        return [self.path / "config.json", *sorted(self.path.glob("*.safetensors"))]


def from_path(path: Path, name: str | None = None) -> ModelFiles:
    """The model at `path`. Raises StartupError if there is none."""
    if path.is_file():
        if _is_tokenizer(path):
            return ModelFiles(check_model_name(name or _name_of(path.stem)), "huggingface", path)
        if path.suffix != ".gguf":
            raise StartupError(f"{path} is not a .gguf file or a model directory")
        return ModelFiles(check_model_name(name or _name_of(path.stem)), "gguf", path)
    if not path.is_dir():
        raise StartupError(f"there is no model at {path}")
    name = check_model_name(name or _name_of(path.resolve().name))
    if (path / "config.json").exists():
        return ModelFiles(name, "huggingface", path)
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return ModelFiles(name, "gguf", found[0])
    if not found and any(map(_is_tokenizer, path.iterdir())):
        return ModelFiles(name, "huggingface", path)
    raise StartupError(
        f"{path} holds no config.json and {len(found)} .gguf files; name the file to serve"
    )


def tokenizer_file(path: Path) -> Path:
    """The file that has the tokenizer: `path`, or the one in that directory.

    Raises StartupError if there is none, or several of which none is the usual one.
    """
    if path.is_file():
        return path
    for name in _WHOLE_TOKENIZERS:
        if (path / name).exists():
            return path / name
    found = [file for file in sorted(path.iterdir()) if _is_tokenizer(file)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise StartupError(f"{path} holds several tokenizers ({names}); name the file to serve")
    raise StartupError(f"there is no tokenizer file {path / 'tokenizer.json'}")


def _is_tokenizer(path: Path) -> bool:
    return (
        path.name == "tokenizer.json"
        or _TEKKEN.fullmatch(path.name) is not None
        or any(_TOKENIZER_SUFFIX.fullmatch(path.name, at) for at in _dots(path.name))
    )


def _dots(name: str) -> list[int]:
    return [at for at, char in enumerate(name) if char == "."]


def is_model_name(text: str) -> bool:
    """Whether `text` can stand in a key, a URL, and below the cache's folder."""
    return _MODEL_NAME.fullmatch(text) is not None and ".." not in text.split("/")


def check_model_name(name: str) -> str:
    """Return `name`. Raises StartupError if it is none."""
    if not is_model_name(name):
        raise StartupError(
            f"model name {name!r} must be 1 to 128 letters, digits or ._/- and begin "
            "with a letter or digit; give another with NAME=PATH"
        )
    return name


def _name_of(stem: str) -> str:
    return stem.lower().replace(" ", "-")
