"""Families of tokenizers: the table, and what makes one from a model's files.

`Backend` is what a family implements, `TokenizerSpec` what a model's files say.
"""

from services.tokenizer.backends.base import BACKENDS, Backend, TokenizerSpec, load_backend
from services.tokenizer.backends.sources import read_spec

__all__ = ["BACKENDS", "Backend", "TokenizerSpec", "load_backend", "read_spec"]
