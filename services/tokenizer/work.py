"""What the pool's processes are asked and what they answer, and how it is framed.

Between parent and child each message is

    u32 length of the rest | u64 id | u64 nanoseconds of work | MessagePack of one type

all little-endian; the nanoseconds are 0 in requests.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from headrace import errors
from headrace.models.files import Format

if TYPE_CHECKING:
    from headrace.errors import HeadraceError

HEADER = struct.Struct("<IQQ")
#: Bytes of the header that its length field counts.
HEADER_REST_LEN = HEADER.size - 4


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One turn of a chat: `as_json`, a whole message as a JSON object, if it is given."""

    role: str
    content: str
    as_json: bytes = b""


class Chat(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a template is given. See ChatTemplateInput in tokenizer.proto."""

    messages: list[Message]
    add_generation_prompt: bool = False
    tools_json: bytes = b""
    template_args_json: bytes = b""


class EncodeOptions(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an encoding is for. See EncodeRequest in tokenizer.proto."""

    namespace_key: bytes = b""
    block_size: int = 0
    max_tokens: int = 0
    skip_special_tokens: bool = False
    truncate: bool = False
    with_offsets: bool = False


class EncodeText(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Plain text."""

    model: str
    text: str
    options: EncodeOptions = EncodeOptions()


class EncodeUtf8(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Plain text as UTF-8 that nobody has checked."""

    model: str
    text: bytes
    options: EncodeOptions = EncodeOptions()


class EncodeChat(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Messages, through the model's template."""

    model: str
    chat: Chat
    options: EncodeOptions = EncodeOptions()


class EncodeIds(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Ready-made ids (u32, little-endian): they are checked and get block ids."""

    model: str
    token_ids: bytes
    options: EncodeOptions = EncodeOptions()


class EncodeBatch(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Many plain texts, UTF-8 that nobody has checked. `first`: the index of the first of
    them in the batch that they are a part of."""

    model: str
    texts: list[bytes]
    options: EncodeOptions = EncodeOptions()
    first: int = 0


class Decode(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Ids (u32, little-endian) to text."""

    model: str
    token_ids: bytes
    skip_special_tokens: bool = False


class Render(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Messages to the template's text."""

    model: str
    chat: Chat


class ReadTable(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """What a gateway needs to detokenize."""

    model: str


Work = EncodeText | EncodeUtf8 | EncodeChat | EncodeIds | EncodeBatch | Decode | Render | ReadTable


class Encoded(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Ids (u32, little-endian), 16 bytes for each full block, and pairs of u32 where each id
    comes from, if that was asked for."""

    token_ids: bytes
    block_ids: bytes
    tokenizer_digest: str
    offsets: bytes = b""


class EncodedBatch(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """All texts' ids one after the other, and how many each has (both u32, little-endian)."""

    token_ids: bytes
    counts: bytes
    tokenizer_digest: str


class Decoded(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """The text of ids."""

    text: str


class Rendered(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """The text of messages."""

    text: str


class Table(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """See DetokenizerTable in tokenizer.proto."""

    tokenizer_digest: str
    data: bytes
    lengths: bytes
    special: bytes
    eos_token_ids: list[int]
    replaces_each_byte: bool
    strips_first_space: bool
    first_ids: bytes
    first_data: bytes
    first_lengths: bytes


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """The work failed. `code` is a google.rpc.Code number."""

    code: int
    message: str
    field: str
    retry_after_ms: int

    @classmethod
    def of(cls, error: HeadraceError) -> Failure:
        """The failure that carries `error`."""
        code = errors.status_of(error).grpc_code
        return cls(code, error.message, error.field, error.retry_after_ms)

    def error(self) -> HeadraceError:
        """The error that it carries."""
        return errors.from_code(
            self.code, self.message, field=self.field, retry_after_ms=self.retry_after_ms
        )


Answer = Encoded | EncodedBatch | Decoded | Rendered | Table | Failure


class Info(msgspec.Struct, frozen=True, array_like=True):
    """One loaded tokenizer."""

    model: str
    tokenizer_digest: str
    vocab_size: int
    has_chat_template: bool
    truncation_side: str
    padding_side: str
    pad_id: int | None
    #: The chat template's source, that for tools if there are two; empty: none.
    chat_template: str = ""


class Limits(msgspec.Struct, frozen=True, array_like=True):
    """What one piece of work may be."""

    max_text_bytes: int = 8 << 20
    max_messages: int = 4096
    max_tokens: int = 1 << 20
    max_texts: int = 16384
    #: What each process keeps of recent prompts, in bytes.
    prefix_cache_bytes: int = 16 << 20


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """What the spawner is started with: (name, format, path) of each model."""

    models: list[tuple[str, Format, str]]
    limits: Limits


class Started(msgspec.Struct, frozen=True, array_like=True):
    """What the spawner says when it has loaded, or why it can't."""

    infos: list[Info]
    fault: str = ""


_encode = msgspec.msgpack.Encoder().encode
decode_work = msgspec.msgpack.Decoder(Work).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def frame(message: Work | Answer, message_id: int, work_ns: int = 0) -> bytes:
    """`message` as it goes over the socket."""
    body = _encode(message)
    return HEADER.pack(HEADER_REST_LEN + len(body), message_id, work_ns) + body
