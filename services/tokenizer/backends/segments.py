"""Text to segments: added tokens are taken out, the rest is normalized.

As Hugging Face's `tokenizers` does it: added tokens that are not `normalized` are
found in the text as it is; what lies between them is normalized; the others are
found in that. At each position the longest wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from services.tokenizer.backends.base import TokenizerSpec


class Segment(NamedTuple):
    """Either an added token (`token_id` ≥ 0) or normalized `text` to be tokenized."""

    text: str
    token_id: int = -1


class Segmenter:
    """Cuts for one vocabulary."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._spec = spec

    def segments(self, text: str, *, parse_added: bool = True) -> list[Segment]:
        """The segments of `text`, in order, none of them empty.

        `prepend_space` is already done. With `parse_added` false no added token is found.
        """
        raise NotImplementedError
