"""One model's tokenizer, loaded: what all parts of it that serving needs hang on."""

from __future__ import annotations

import struct
from functools import cached_property
from typing import TYPE_CHECKING

from headrace.blocks import pack_tokens
from headrace.errors import StartupError
from services.tokenizer import work
from services.tokenizer.backends import load_backend, read_spec
from services.tokenizer.backends.offsets import OffsetFinder
from services.tokenizer.templates import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from headrace.models.files import ModelFiles

_MAX_PIECE_LEN = (1 << 16) - 1


class Tokenizer:
    """Raises StartupError if the model's files are bad."""

    def __init__(self, files: ModelFiles) -> None:
        spec = read_spec(files)
        self._spec = spec
        self.backend = load_backend(spec)
        self.digest = files.tokenizer_digest()
        self.template = self._template(files.name, spec.chat_template)
        #: For chats with tools.
        self.tool_template = self._template(files.name, spec.tool_template) or self.template
        self.added = spec.added
        self.prefix = pack_tokens(spec.prefix_ids)
        self.suffix = pack_tokens(spec.suffix_ids)
        self.eos_token_ids = spec.eos_token_ids
        self.truncation_side = spec.truncation_side
        texts = self.backend.texts
        longest = max(map(len, (*texts.pieces, *texts.first.values())), default=0)
        if longest > _MAX_PIECE_LEN:
            raise StartupError(f"{spec.source}: a token of {longest} bytes is not supported")

    @cached_property
    def offsets(self) -> OffsetFinder:
        """Made where it is asked for first: most processes never are."""
        return OffsetFinder(self._spec, self.backend.texts)

    def info(self, model: str) -> work.Info:
        """What others may know of it."""
        return work.Info(
            model,
            self.digest,
            self.backend.vocab_size,
            self.template is not None,
            self._spec.truncation_side,
            self._spec.padding_side,
            self._spec.pad_id,
            self._spec.tool_template or self._spec.chat_template or "",
        )

    def _template(self, model: str, source: str | None) -> ChatTemplate | None:
        return None if source is None else ChatTemplate(model, source, self._spec.named_tokens)


def load(models: Iterable[ModelFiles]) -> dict[str, Tokenizer]:
    """The tokenizers of `models`, by name."""
    return {files.name: Tokenizer(files) for files in models}


def table_of(tokenizer: Tokenizer) -> work.Table:
    """What a gateway needs to detokenize."""
    texts = tokenizer.backend.texts
    first = sorted(texts.first)
    return work.Table(
        tokenizer_digest=tokenizer.digest,
        data=b"".join(texts.pieces),
        lengths=_lengths(texts.pieces),
        special=bytes(i in texts.special_ids for i in range(len(texts.pieces))),
        eos_token_ids=list(tokenizer.eos_token_ids),
        replaces_each_byte=texts.replaces_each_byte,
        strips_first_space=texts.strips_first_space,
        first_ids=pack_tokens(first),
        first_data=b"".join(texts.first[i] for i in first),
        first_lengths=_lengths([texts.first[i] for i in first]),
    )


def _lengths(pieces: Iterable[bytes]) -> bytes:
    """u16, little-endian."""
    lengths = [*map(len, pieces)]
    return struct.pack(f"<{len(lengths)}H", *lengths)
