"""What the tokenizer service does, as plain calls: one piece of work in, one answer out.

It knows the loaded tokenizers and the limits, no process, no wire and no clock.
Every refusal is a HeadraceError that names field, limit and value.
"""

from __future__ import annotations

from functools import singledispatchmethod
from itertools import chain
from typing import TYPE_CHECKING

from headrace.blocks import ID_LEN, TOKEN_LEN, pack_tokens, unpack_tokens
from headrace.errors import InvalidArgument, NotFound
from services.tokenizer import work
from services.tokenizer.prefix_cache import ByteCache, PieceEncoder, packed_block_ids
from services.tokenizer.sandbox import RenderLimits
from services.tokenizer.tokenizer import table_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.tokenizer.tokenizer import Tokenizer


class TokenizerService:
    """The work, over loaded tokenizers. One thread, the process's first (see sandbox)."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer], limits: work.Limits) -> None:
        self._tokenizers = tokenizers
        self._limits = limits
        self._cache = ByteCache(limits.prefix_cache_bytes)
        self._encoders = {
            name: PieceEncoder(name, tokenizer.backend.encode, tokenizer.added, self._cache)
            for name, tokenizer in tokenizers.items()
        }

    @singledispatchmethod
    def do(self, item: work.Work) -> work.Answer:
        """Do it. Raises a HeadraceError if it can't be done."""
        raise TypeError(f"unknown work {type(item)}")

    @do.register
    def _(self, item: work.EncodeText) -> work.Encoded:
        self._tokenizer(item.model)
        self._check_text(item.text, "prompt")
        return self._encoded(item.model, item.text, item.options, "prompt")

    @do.register
    def _(self, item: work.EncodeUtf8) -> work.Encoded:
        self._tokenizer(item.model)
        text = _decoded(item.text, "text_utf8")
        self._check_text(text, "prompt")
        return self._encoded(item.model, text, item.options, "prompt")

    @do.register
    def _(self, item: work.EncodeChat) -> work.Encoded:
        text = self._render(item.model, item.chat)
        # Its template wrote the special tokens.
        return self._encoded(item.model, text, item.options, "messages", is_plain=False)

    @do.register
    def _(self, item: work.EncodeIds) -> work.Encoded:
        tokenizer = self._tokenizer(item.model)
        if not item.token_ids:
            raise InvalidArgument("token_ids is empty", field="token_ids")
        if item.options.with_offsets:
            raise InvalidArgument("token_ids have no text to have offsets in", field="with_offsets")
        self._unpack(tokenizer, item.token_ids)
        kept = self._kept(tokenizer, item.token_ids, 0, item.options, "token_ids")
        return self._with_blocks(tokenizer, _at(item.token_ids, kept), item.options)

    @do.register
    def _(self, item: work.EncodeBatch) -> work.EncodedBatch:
        tokenizer = self._tokenizer(item.model)
        packed = []
        for at, data in enumerate(item.texts, item.first):
            field = f"texts[{at}]"
            text = _decoded(data, field)
            self._check_text(text, field)
            packed.append(self._encoded(item.model, text, item.options, field).token_ids)
        counts = pack_tokens(len(ids) // TOKEN_LEN for ids in packed)
        return work.EncodedBatch(b"".join(packed), counts, tokenizer.digest)

    @do.register
    def _(self, item: work.Decode) -> work.Decoded:
        tokenizer = self._tokenizer(item.model)
        ids = self._unpack(tokenizer, item.token_ids)
        texts = tokenizer.backend.texts
        return work.Decoded(texts.decode(ids, skip_special=item.skip_special_tokens))

    @do.register
    def _(self, item: work.Render) -> work.Rendered:
        return work.Rendered(self._render(item.model, item.chat))

    @do.register
    def _(self, item: work.ReadTable) -> work.Table:
        return table_of(self._tokenizer(item.model))

    def _tokenizer(self, model: str) -> Tokenizer:
        tokenizer = self._tokenizers.get(model)
        if tokenizer is None:
            known = ", ".join(sorted(self._tokenizers))
            raise NotFound(f"model {model!r} is not served here ({known} is)", field="model")
        return tokenizer

    def _check_text(self, text: str, field: str) -> None:
        if not text:
            raise InvalidArgument(f"{_subject(field)} is empty", field=field)
        self._check_len(text, field=field)

    def _check_len(self, *texts: str | bytes, field: str) -> None:
        limit = self._limits.max_text_bytes
        # A character is one byte at least, and counting characters is free.
        length = sum(map(len, texts))
        if length <= limit:
            length = sum(map(_num_bytes, texts))
        if length > limit:
            raise InvalidArgument(
                f"the text of {field} has at least {length:,} bytes, the limit is {limit:,}",
                field=field,
            )

    def _render(self, model: str, chat: work.Chat) -> str:
        tokenizer = self._tokenizer(model)
        template = tokenizer.tool_template if chat.tools_json else tokenizer.template
        messages = chat.messages
        if not messages:
            raise InvalidArgument("messages is empty", field="messages")
        limits = self._limits
        if len(messages) > limits.max_messages:
            raise InvalidArgument(
                f"there are {len(messages):,} messages, the limit is {limits.max_messages:,}",
                field="messages",
            )
        if template is None:
            raise InvalidArgument(
                f"model {model} has no chat template; give a prompt", field="messages"
            )
        parts = [part for m in messages for part in (m.role, m.content, m.as_json)]
        self._check_len(*parts, chat.tools_json, chat.template_args_json, field="messages")
        # Twice the text: templates repeat little.
        return template.render(chat, RenderLimits(max_len=2 * limits.max_text_bytes))

    def _unpack(self, tokenizer: Tokenizer, packed: bytes) -> list[int]:
        if len(packed) % TOKEN_LEN:
            raise InvalidArgument(
                f"token_ids has {len(packed)} bytes, not a multiple of {TOKEN_LEN}",
                field="token_ids",
            )
        count, limit = len(packed) // TOKEN_LEN, self._limits.max_tokens
        if count > limit:
            raise InvalidArgument(
                f"token_ids has {count:,} tokens, the limit is {limit:,}", field="token_ids"
            )
        ids = unpack_tokens(packed)
        size = tokenizer.backend.vocab_size
        if ids and max(ids) >= size:
            at = next(at for at, token_id in enumerate(ids) if token_id >= size)
            raise InvalidArgument(
                f"token_ids[{at}] is {ids[at]}, the vocabulary has {size} tokens",
                field="token_ids",
            )
        return ids

    def _encoded(
        self,
        model: str,
        text: str,
        options: work.EncodeOptions,
        field: str,
        *,
        is_plain: bool = True,
    ) -> work.Encoded:
        tokenizer = self._tokenizer(model)
        ids = self._encoders[model].encode(text)
        prefix, suffix = b"", b""
        if is_plain and not options.skip_special_tokens:
            prefix, suffix = tokenizer.prefix, tokenizer.suffix
        kept = self._kept(tokenizer, ids, len(prefix + suffix), options, field)
        offsets = b""
        if options.with_offsets:
            ranges = tokenizer.offsets.find(text, unpack_tokens(ids))[kept]
            ranges = [(0, 0)] * (len(prefix) // TOKEN_LEN) + ranges
            ranges += [(len(text), len(text))] * (len(suffix) // TOKEN_LEN)
            offsets = pack_tokens(chain.from_iterable(ranges))
        ids = prefix + _at(ids, kept) + suffix
        return self._with_blocks(tokenizer, ids, options, offsets)

    def _kept(
        self,
        tokenizer: Tokenizer,
        ids: bytes,
        around_len: int,
        options: work.EncodeOptions,
        field: str,
    ) -> slice:
        """Which of `ids` remain, with `around_len` bytes of ids put around them."""
        limit = min(options.max_tokens or self._limits.max_tokens, self._limits.max_tokens)
        num_around = around_len // TOKEN_LEN
        count = len(ids) // TOKEN_LEN
        if count + num_around <= limit:
            if count + num_around == 0:
                raise InvalidArgument(f"{_subject(field)} becomes no tokens at all", field=field)
            return slice(0, count)
        if not options.truncate:
            raise InvalidArgument(
                f"{_subject(field)} has {count + num_around:,} tokens, the limit is {limit:,}",
                field=field,
            )
        room = limit - num_around
        if room < 1:
            raise InvalidArgument(
                f"max_tokens is {limit}, the special tokens around the text are {num_around} alone",
                field="max_tokens",
            )
        is_left = tokenizer.truncation_side == "left"
        return slice(count - room, count) if is_left else slice(0, room)

    def _with_blocks(
        self,
        tokenizer: Tokenizer,
        ids: bytes,
        options: work.EncodeOptions,
        offsets: bytes = b"",
    ) -> work.Encoded:
        blocks = b""
        if options.namespace_key:
            if len(options.namespace_key) != ID_LEN:
                raise InvalidArgument(
                    f"namespace_key has {len(options.namespace_key)} bytes, not {ID_LEN}",
                    field="namespace_key",
                )
            if options.block_size < 1:
                raise InvalidArgument(
                    f"block_size must be 1 or more, not {options.block_size}", field="block_size"
                )
            blocks = packed_block_ids(ids, options.block_size, options.namespace_key, self._cache)
        return work.Encoded(ids, blocks, tokenizer.digest, offsets)


def _at(ids: bytes, kept: slice) -> bytes:
    return ids[kept.start * TOKEN_LEN : kept.stop * TOKEN_LEN]


def _subject(field: str) -> str:
    return field if "[" in field else "the prompt"


def _decoded(data: bytes, field: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"{field} is no UTF-8: {error.reason} at byte {error.start}", field=field
        ) from None


def _num_bytes(text: str | bytes) -> int:
    return len(text) if text.isascii() else len(text if isinstance(text, bytes) else text.encode())
