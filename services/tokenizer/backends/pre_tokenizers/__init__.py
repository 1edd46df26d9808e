"""How text becomes words: the table of known ways, and what makes one from a file's components."""

from services.tokenizer.backends.pre_tokenizers.components import from_components, from_pattern
from services.tokenizer.backends.pre_tokenizers.known import PRE_TOKENIZERS, PreTokenizer

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "from_components", "from_pattern"]
