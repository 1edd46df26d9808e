"""What a model's files say about its tokenizer, as a TokenizerSpec.

A component that is not known is a StartupError that names it: approximating one
would give ids that are almost right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.errors import StartupError
from headrace.models.files import tokenizer_file
from services.tokenizer.backends.sources.gguf import read_gguf
from services.tokenizer.backends.sources.huggingface import read_huggingface
from services.tokenizer.backends.sources.ranks import read_ranks, read_tekken
from services.tokenizer.backends.sources.sentencepiece_model import read_sentencepiece

if TYPE_CHECKING:
    from headrace.models.files import ModelFiles
    from services.tokenizer.backends.base import TokenizerSpec

__all__ = ["read_spec"]


def read_spec(files: ModelFiles) -> TokenizerSpec:
    """The tokenizer of a model. Raises StartupError naming file and fault."""
    try:
        if files.format == "gguf":
            return read_gguf(files.path)
        path = tokenizer_file(files.path)
        if path.name == "tokenizer.json":
            return read_huggingface(path.parent)
        if path.suffix == ".json":
            return read_tekken(path)
        return read_ranks(path) if path.suffix == ".tiktoken" else read_sentencepiece(path)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise StartupError(f"the tokenizer of {files.path} is malformed: {error!r}") from error
