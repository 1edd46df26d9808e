"""The tokenizer's work and its refusals, without processes."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from headrace.blocks import block_ids, namespace_key, pack_tokens, unpack_tokens
from headrace.errors import HeadraceError, InvalidArgument, NotFound
from headrace.models.files import ModelFiles
from services.tokenizer.service import Tokenizer, TokenizerService
from services.tokenizer.work import (
    HEADER,
    Decode,
    Decoded,
    EncodeChat,
    Encoded,
    EncodeIds,
    EncodeOptions,
    EncodeText,
    Limits,
    Message,
    ReadTable,
    Render,
    Rendered,
    Table,
    Work,
    decode_work,
    frame,
)

KEY = namespace_key("test")
LIMITS = Limits(max_text_bytes=2000, max_messages=3, max_tokens=500)
HELLO = [Message("user", "Hello")]


@pytest.fixture(scope="module")
def tokenizer(smollm2: ModelFiles) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture
def do(tokenizer: Tokenizer) -> Callable[[Work], object]:
    return TokenizerService({"m": tokenizer, "other": tokenizer}, LIMITS).do


def ids_of(answer: object) -> list[int]:
    assert isinstance(answer, Encoded)
    return unpack_tokens(answer.token_ids)


def test_text_becomes_ids_and_block_ids(do: Callable[[Work], object]) -> None:
    answer = do(EncodeText("m", "a b c d e f g h i", EncodeOptions(KEY, 4)))
    assert isinstance(answer, Encoded)
    assert len(unpack_tokens(answer.token_ids)) == 9
    assert answer.block_ids == b"".join(block_ids(answer.token_ids, 4, KEY))
    assert len(answer.block_ids) == 32
    again = do(EncodeIds("m", answer.token_ids, EncodeOptions(KEY, 4)))
    assert again == answer
    assert do(EncodeText("m", "a b")).block_ids == b""  # type: ignore[attr-defined]


def test_text_gets_what_the_model_puts_around_it(tokenizer: Tokenizer) -> None:
    tokenizer.prefix, tokenizer.suffix = pack_tokens([1]), pack_tokens([2])
    try:
        do = TokenizerService({"m": tokenizer}, LIMITS).do
        plain = ids_of(do(EncodeText("m", "hi", EncodeOptions(skip_special_tokens=True))))
        assert ids_of(do(EncodeText("m", "hi"))) == [1, *plain, 2]
        chat = ids_of(do(EncodeChat("m", HELLO)))
        assert chat[:2] != [1, 1]
        assert chat[-1] != 2
    finally:
        tokenizer.prefix = tokenizer.suffix = b""


def test_chats_render_and_ids_decode(do: Callable[[Work], object]) -> None:
    rendered = do(Render("m", HELLO, True))
    assert isinstance(rendered, Rendered)
    assert rendered.text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    encoded = do(EncodeChat("m", HELLO, True))
    assert isinstance(encoded, Encoded)
    assert do(Decode("m", encoded.token_ids)) == Decoded(rendered.text)
    shown = do(Decode("m", encoded.token_ids, True))
    assert isinstance(shown, Decoded)
    assert shown.text.endswith("user\nHello\nassistant\n")
    assert do(Decode("m", b"")) == Decoded("")


def test_the_table_is_what_decode_does(do: Callable[[Work], object], tokenizer: Tokenizer) -> None:
    table = do(ReadTable("m"))
    assert isinstance(table, Table)
    lengths = array("H", table.lengths)
    assert len(lengths) == len(table.special) == 49152
    assert sum(lengths) == len(table.data)
    assert table.eos_token_ids == [2]
    assert table.tokenizer_digest == tokenizer.digest
    assert sum(table.special) == 17
    ids = ids_of(do(EncodeText("m", "Grüße, 中文 👍🏽!")))
    starts = [sum(lengths[:i]) for i in ids]
    text = b"".join(
        table.data[s : s + lengths[i]] for s, i in zip(starts, ids, strict=True)
    ).decode()
    assert text == "Grüße, 中文 👍🏽!"


@pytest.mark.parametrize(
    ("item", "kind", "field", "named"),
    [
        (EncodeText("no", "x"), NotFound, "model", r"'no' is not served here \(m, other"),
        (EncodeText("m", ""), InvalidArgument, "prompt", "empty"),
        (EncodeText("m", "\x04"), InvalidArgument, "prompt", "no tokens"),
        (EncodeText("m", "x" * 2001), InvalidArgument, "prompt", "2,001 bytes.* 2,000"),
        (EncodeText("m", "é" * 1001), InvalidArgument, "prompt", "2,002 bytes.* 2,000"),
        (EncodeText("m", "a b " * 300), InvalidArgument, "prompt", "601 tokens.* 500"),
        (
            EncodeText("m", "a b c", EncodeOptions(max_tokens=2)),
            InvalidArgument,
            "prompt",
            "the prompt has 3 tokens, the limit is 2",
        ),
        (
            EncodeChat("m", HELLO, True, EncodeOptions(max_tokens=9)),
            InvalidArgument,
            "messages",
            "tokens, the limit is 9",
        ),
        (EncodeText("m", "x", EncodeOptions(b"short", 4)), InvalidArgument, "namespace_key", "5"),
        (EncodeText("m", "x", EncodeOptions(KEY, 0)), InvalidArgument, "block_size", "not 0"),
        (EncodeChat("m", []), InvalidArgument, "messages", "empty"),
        (EncodeChat("m", HELLO * 4), InvalidArgument, "messages", "4 messages.* 3"),
        (
            EncodeChat("m", [Message("user", "é" * 600), Message("user", "x" * 900)]),
            InvalidArgument,
            "messages",
            "2,108 bytes.* 2,000",
        ),
        (Render("m", []), InvalidArgument, "messages", "empty"),
        (EncodeIds("m", b""), InvalidArgument, "token_ids", "empty"),
        (EncodeIds("m", b"12345"), InvalidArgument, "token_ids", "5 bytes"),
        (
            EncodeIds("m", pack_tokens([1, 2, 49152])),
            InvalidArgument,
            "token_ids",
            r"token_ids\[2\] is 49152, the vocabulary has 49152",
        ),
        (
            Decode("m", pack_tokens([2**32 - 1])),
            InvalidArgument,
            "token_ids",
            r"\[0\] is 4294967295",
        ),
        (Decode("m", bytes(4 * 501)), InvalidArgument, "token_ids", "501 tokens.* 500"),
    ],
)
def test_a_refusal_names_field_limit_and_value(
    do: Callable[[Work], object], item: Work, kind: type[HeadraceError], field: str, named: str
) -> None:
    with pytest.raises(kind, match=named) as caught:
        do(item)
    assert caught.value.field == field


def test_a_model_without_a_template_says_so(tokenizer: Tokenizer) -> None:
    template, tokenizer.template = tokenizer.template, None
    try:
        with pytest.raises(InvalidArgument, match="m has no chat template"):
            TokenizerService({"m": tokenizer}, LIMITS).do(EncodeChat("m", HELLO))
    finally:
        tokenizer.template = template


def test_work_survives_its_frame() -> None:
    for item in (
        EncodeText("m", "é" * 9, EncodeOptions(KEY, 16, 3, True)),
        EncodeChat("m", HELLO, True),
        EncodeIds("m", b"\0\0\0\0"),
        Decode("m", b"1234", True),
        Render("m", HELLO),
        ReadTable("m"),
    ):
        data = frame(item, 7)
        length, job_id, _ = HEADER.unpack_from(data)
        assert (length + 4, job_id) == (len(data), 7)
        assert decode_work(data[HEADER.size :]) == item
