"""What the tokenizer service does, as plain calls: one piece of work in, one answer out.

It knows the loaded tokenizers and the limits, no process, no wire and no clock.
Every refusal is a HeadraceError that names field, limit and value.
"""

from __future__ import annotations

from array import array
from functools import singledispatchmethod
from typing import TYPE_CHECKING

from headrace.blocks import ID_LEN, TOKEN_LEN, block_ids, pack_tokens, unpack_tokens
from headrace.errors import InvalidArgument, NotFound, StartupError
from services.tokenizer import work
from services.tokenizer.backends import load_backend, read_spec
from services.tokenizer.templates import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from headrace.models.files import ModelFiles

_MAX_TOKEN_LEN = (1 << 16) - 1


class Tokenizer:
    """One model's tokenizer, loaded. Raises StartupError if its files are bad."""

    def __init__(self, files: ModelFiles) -> None:
        spec = read_spec(files)
        self.backend = load_backend(spec)
        self.digest = files.tokenizer_digest()
        self.template = (
            ChatTemplate(files.name, spec.chat_template, spec.named_tokens)
            if spec.chat_template is not None
            else None
        )
        self.prefix = pack_tokens(spec.prefix_ids)
        self.suffix = pack_tokens(spec.suffix_ids)
        self.eos_token_ids = spec.eos_token_ids
        longest = max(map(len, self.backend.token_bytes), default=0)
        if longest > _MAX_TOKEN_LEN:
            raise StartupError(f"{spec.source}: a token of {longest} bytes is not supported")

    def info(self, model: str) -> work.Info:
        """What others may know of it."""
        return work.Info(model, self.digest, self.backend.vocab_size, self.template is not None)


def load(models: Iterable[ModelFiles]) -> dict[str, Tokenizer]:
    """The tokenizers of `models`, by name."""
    return {files.name: Tokenizer(files) for files in models}


class TokenizerService:
    """The work, over loaded tokenizers. One thread, the process's first (see templates)."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer], limits: work.Limits) -> None:
        self._tokenizers = tokenizers
        self._limits = limits

    @singledispatchmethod
    def do(self, item: work.Work) -> work.Answer:
        """Do it. Raises a HeadraceError if it can't be done."""
        raise TypeError(f"unknown work {type(item)}")

    @do.register
    def _(self, item: work.EncodeText) -> work.Encoded:
        tokenizer = self._tokenizer(item.model)
        self._check_text(item.text, "prompt")
        ids = tokenizer.backend.encode(item.text)
        if not item.options.skip_special_tokens:
            ids = tokenizer.prefix + ids + tokenizer.suffix
        return self._encoded(tokenizer, ids, item.options, "prompt")

    @do.register
    def _(self, item: work.EncodeChat) -> work.Encoded:
        tokenizer = self._tokenizer(item.model)
        text = self._render(item.model, item.messages, item.add_generation_prompt)
        ids = tokenizer.backend.encode(text)
        return self._encoded(tokenizer, ids, item.options, "messages")

    @do.register
    def _(self, item: work.EncodeIds) -> work.Encoded:
        tokenizer = self._tokenizer(item.model)
        if not item.token_ids:
            raise InvalidArgument("token_ids is empty", field="token_ids")
        self._unpack(tokenizer, item.token_ids)
        return self._encoded(tokenizer, item.token_ids, item.options, "token_ids")

    @do.register
    def _(self, item: work.Decode) -> work.Decoded:
        tokenizer = self._tokenizer(item.model)
        ids = self._unpack(tokenizer, item.token_ids)
        return work.Decoded(tokenizer.backend.decode(ids, skip_special=item.skip_special_tokens))

    @do.register
    def _(self, item: work.Render) -> work.Rendered:
        return work.Rendered(self._render(item.model, item.messages, item.add_generation_prompt))

    @do.register
    def _(self, item: work.ReadTable) -> work.Table:
        tokenizer = self._tokenizer(item.model)
        backend = tokenizer.backend
        lengths = array("H", map(len, backend.token_bytes))
        return work.Table(
            tokenizer_digest=tokenizer.digest,
            data=b"".join(backend.token_bytes),
            lengths=b"".join(n.to_bytes(2, "little") for n in lengths),
            special=bytes(i in backend.special_ids for i in range(backend.vocab_size)),
            eos_token_ids=list(tokenizer.eos_token_ids),
        )

    def _tokenizer(self, model: str) -> Tokenizer:
        tokenizer = self._tokenizers.get(model)
        if tokenizer is None:
            known = ", ".join(sorted(self._tokenizers))
            raise NotFound(f"model {model!r} is not served here ({known} is)", field="model")
        return tokenizer

    def _check_text(self, text: str, field: str) -> None:
        if not text:
            raise InvalidArgument(f"the {field} is empty", field=field)
        self._check_len(text, field=field)

    def _check_len(self, *texts: str, field: str) -> None:
        limit = self._limits.max_text_bytes
        # A character is one byte at least, and counting characters is free.
        length = sum(map(len, texts))
        if length <= limit:
            length = sum(len(t) if t.isascii() else len(t.encode()) for t in texts)
        if length > limit:
            raise InvalidArgument(
                f"the text of {field} has at least {length:,} bytes, the limit is {limit:,}",
                field=field,
            )

    def _render(self, model: str, messages: Sequence[work.Message], add_prompt: bool) -> str:
        template = self._tokenizer(model).template
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
        self._check_len(*(part for m in messages for part in (m.role, m.content)), field="messages")
        # Twice the text: templates repeat little.
        return template.render(
            messages, add_generation_prompt=add_prompt, max_len=2 * limits.max_text_bytes
        )

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
        self, tokenizer: Tokenizer, ids: bytes, options: work.EncodeOptions, field: str
    ) -> work.Encoded:
        limit = min(options.max_tokens or self._limits.max_tokens, self._limits.max_tokens)
        count = len(ids) // TOKEN_LEN
        if count > limit:
            raise InvalidArgument(
                f"the prompt has {count:,} tokens, the limit is {limit:,}", field=field
            )
        if not ids:
            raise InvalidArgument("the prompt becomes no tokens at all", field=field)
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
            blocks = b"".join(block_ids(ids, options.block_size, options.namespace_key))
        return work.Encoded(ids, blocks, tokenizer.digest)
