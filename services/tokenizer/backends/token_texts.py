"""How token ids become text: the same for the service's decode and the gateway's table.

    shown tokens -> bytes of each -> concatenation -> UTF-8

Which bytes a token stands for is decided once per vocabulary, by family; then no
family is known any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """One vocabulary's texts. See DetokenizerTable in tokenizer.proto for the fields' meaning."""

    #: By id.
    pieces: Sequence[bytes]
    special_ids: frozenset[int]
    #: Each byte that is part of no whole character becomes one U+FFFD; else an invalid
    #: sequence becomes what Python's "replace" makes of it.
    replaces_each_byte: bool = False
    strips_first_space: bool = False
    #: Pieces that differ when nothing is shown before them.
    first: Mapping[int, bytes] = field(default_factory=dict)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of `ids`, all of them within the vocabulary."""
        if skip_special and not self.special_ids.isdisjoint(ids):
            ids = [i for i in ids if i not in self.special_ids]
        return b"".join(map(self.pieces.__getitem__, ids)).decode("utf-8", "replace")
