"""What a family of tokenizers implements, and what it is made from.

Ids are positions in the vocabulary. Nothing here knows chats, files or processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable

#: Family -> the class that implements it, called with a TokenizerSpec.
BACKENDS = {
    "byte_level_bpe": "services.tokenizer.backends.byte_level_bpe:ByteLevelBpe",
}


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in the text before anything else looks at it."""

    token_id: int
    content: str
    #: Not shown in generated text.
    is_special: bool


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """What a model's files say about its tokenizer, whatever their format."""

    #: Where it was read, for errors.
    source: str
    #: A key of BACKENDS.
    family: str
    #: A key of `pre_tokenizers.PRE_TOKENIZERS`.
    pre_tokenizer: str
    #: By id; an id that is not used has an empty string.
    tokens: Sequence[str]
    #: In order of rank.
    merges: Sequence[tuple[str, str]]
    added: Sequence[AddedToken] = ()
    #: A word that is a token as a whole becomes it, whatever the merges say.
    ignore_merges: bool = False
    #: Put around plain text.
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    #: The tokens that end a generation.
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    #: What the template may name: "bos_token" -> "<s>".
    named_tokens: Mapping[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """One loaded vocabulary. Called from one thread; may keep bounded caches."""

    #: One more than the largest id.
    vocab_size: int
    #: The bytes that each id stands for, by id. The text of a sequence is their
    #: concatenation, read as UTF-8 with invalid sequences replaced.
    token_bytes: Sequence[bytes]
    special_ids: frozenset[int]

    def encode(self, text: str, *, parse_added: bool = True) -> bytes:
        """The ids of `text` as little-endian u32, nothing put around them.

        With `parse_added` false, added tokens in the text are text like any other.
        """

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of `ids`, all of them within the vocabulary."""


def load_backend(spec: TokenizerSpec) -> Backend:
    """The backend of `spec`. Raises StartupError if its parts don't fit together."""
    module, _, name = BACKENDS[spec.family].partition(":")
    make = cast("Callable[[TokenizerSpec], Backend]", getattr(import_module(module), name))
    return make(spec)
