"""What a family of tokenizers implements, and what it is made from.

    text -> added tokens | normalizer -> pre-tokenizer -> model -> ids   (Backend.encode)
    ids -> texts of tokens -> text                                       (Backend.decode)

Ids are positions in the vocabulary. Nothing here knows chats, files or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.tokenizer.backends.token_texts import TokenTexts

Side = Literal["left", "right"]

#: Family -> the class that implements it, called with a TokenizerSpec.
BACKENDS = {
    "byte_level_bpe": "services.tokenizer.backends.byte_level_bpe:ByteLevelBpe",
    "sentencepiece_bpe": "services.tokenizer.backends.sentencepiece_bpe:SentencePieceBpe",
    "unigram": "services.tokenizer.backends.unigram:Unigram",
    "wordpiece": "services.tokenizer.backends.wordpiece:WordPiece",
}


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in the text before anything else looks at it.

    `single_word`, `lstrip`, `rstrip` and `normalized` mean what they mean in a
    tokenizer.json: only between non-word characters; take white space before, or
    behind, with it; look for it (normalized itself) in the normalized text.
    """

    token_id: int
    content: str
    #: Not shown in generated text.
    is_special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class Words(Protocol):
    """A pre-tokenizer: how a (normalized) text becomes words."""

    def words(self, text: str) -> Iterator[list[str]]:
        """The words of `text`, in order, some at a time."""


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """What a model's files say about its tokenizer, whatever their format.

    The first group concerns all families, the others those that they name. A
    field at its default means that the files ask for nothing of the kind.
    """

    #: Where it was read, for errors.
    source: str
    #: A key of BACKENDS.
    family: str
    #: By id; an id that is not used has an empty string. Byte-level families spell
    #: bytes in GPT-2's alphabet, SentencePiece's write spaces as U+2581 and bytes as <0x0A>.
    tokens: Sequence[str]
    added: Sequence[AddedToken] = ()
    normalizer: Callable[[str], str] | None = None
    pre_tokenizer: Words | None = None
    #: The normalizer and the pre-tokenizer do with each chunk between white space what they
    #: do with it in any text, and take runs of white space for one space (unless a mark at
    #: a chunk's edge joins the space). ASCII characters are normalized one by one, and
    #: ASCII letters in a row are not cut. So with BertNormalizer and BertPreTokenizer; a
    #: SentencePiece character map that joins spaces, and Metaspace.
    has_local_chunks: bool = False
    #: Put a space (U+2581 for SentencePiece's families) before the text, if it does not
    #: begin with one: "first" where nothing stands before, "always" after added tokens too.
    prepend_space: Literal["never", "first", "always"] = "never"
    #: The token for what the vocabulary lacks.
    unk_id: int | None = None

    # byte_level_bpe and sentencepiece_bpe: which pairs become one, and in which order.
    #: In order of rank.
    merges: Sequence[tuple[str, str]] = ()
    #: Instead of merges: a pair merges if both together are a token; the one of lowest
    #: rank first, leftmost if equal. By id (tiktoken's rank; SentencePiece's negated score).
    token_ranks: Sequence[float] | None = None
    #: A word that is a token as a whole becomes it, whatever the merges say.
    ignore_merges: bool = False

    # sentencepiece_bpe and unigram.
    #: What is no token becomes its bytes' tokens instead of `unk_id`.
    byte_fallback: bool = False
    #: Unknown characters in a row become one `unk_id`.
    fuse_unk: bool = False

    # unigram: log probabilities, by id.
    scores: Sequence[float] = ()

    # wordpiece.
    continuing_prefix: str = "##"
    #: Words of more characters become `unk_id`.
    max_word_len: int = 100
    #: Decoding takes spaces before punctuation away, as Hugging Face's WordPiece decoder does.
    cleans_up: bool = True

    # Around plain text.
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    truncation_side: Side = "right"
    padding_side: Side = "right"
    pad_id: int | None = None

    #: The tokens that end a generation.
    eos_token_ids: tuple[int, ...] = ()
    #: Decoding drops one space at the text's start.
    strips_first_space: bool = False
    chat_template: str | None = None
    #: Taken in its place when tools are given.
    tool_template: str | None = None
    #: What the template may name: "bos_token" -> "<s>".
    named_tokens: Mapping[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """One loaded vocabulary. Called from one thread; may keep bounded caches."""

    #: One more than the largest id.
    vocab_size: int
    #: How ids become text.
    texts: TokenTexts

    def encode(self, text: str, *, parse_added: bool = True) -> bytes:
        """The ids of `text` as little-endian u32, nothing put around them.

        With `parse_added` false, added tokens in the text are text like any other.
        """


def load_backend(spec: TokenizerSpec) -> Backend:
    """The backend of `spec`. Raises StartupError if its parts don't fit together."""
    module, _, name = BACKENDS[spec.family].partition(":")
    make = cast("Callable[[TokenizerSpec], Backend]", getattr(import_module(module), name))
    return make(spec)
