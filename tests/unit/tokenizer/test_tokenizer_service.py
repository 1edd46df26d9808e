"""The tokenizer's work and its refusals, without processes."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import chain

import pytest

from headrace.blocks import block_ids, namespace_key, pack_tokens, unpack_tokens
from headrace.errors import HeadraceError, InvalidArgument, NotFound
from headrace.models.files import ModelFiles
from services.tokenizer.service import TokenizerService
from services.tokenizer.tokenizer import Tokenizer
from services.tokenizer.work import (
    HEADER,
    Chat,
    Decode,
    Decoded,
    EncodeBatch,
    EncodeChat,
    Encoded,
    EncodedBatch,
    EncodeIds,
    EncodeOptions,
    EncodeText,
    EncodeUtf8,
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
        chat = ids_of(do(EncodeChat("m", Chat(HELLO))))
        assert chat[:2] != [1, 1]
        assert chat[-1] != 2
    finally:
        tokenizer.prefix = tokenizer.suffix = b""


def test_utf8_that_nobody_checked_is_text(do: Callable[[Work], object]) -> None:
    assert do(EncodeUtf8("m", "Grüße 中".encode())) == do(EncodeText("m", "Grüße 中"))


def test_a_batch_is_its_texts(do: Callable[[Work], object]) -> None:
    texts = ["a b c", "Grüße", "x" * 50]
    answer = do(EncodeBatch("m", [text.encode() for text in texts], EncodeOptions(max_tokens=40)))
    assert isinstance(answer, EncodedBatch)
    expected = [ids_of(do(EncodeText("m", text))) for text in texts]
    assert unpack_tokens(answer.counts) == [*map(len, expected)]
    assert unpack_tokens(answer.token_ids) == [*chain.from_iterable(expected)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_is_at_the_models_side_and_keeps_special_tokens(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    monkeypatch.setattr(tokenizer, "prefix", pack_tokens([1]))
    monkeypatch.setattr(tokenizer, "suffix", pack_tokens([2]))
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    do = TokenizerService({"m": tokenizer}, LIMITS).do
    text = "a b c d e f g h i"
    whole = ids_of(do(EncodeText("m", text)))
    cut = do(EncodeText("m", text, EncodeOptions(KEY, 2, 6, truncate=True, with_offsets=True)))
    assert isinstance(cut, Encoded)
    kept = whole[1:5] if side == "right" else whole[-5:-1]
    assert ids_of(cut) == [1, *kept, 2]
    assert cut.block_ids == b"".join(block_ids(cut.token_ids, 2, KEY))
    starts, ends = unpack_tokens(cut.offsets)[::2], unpack_tokens(cut.offsets)[1::2]
    assert (starts[0], ends[0], starts[-1], ends[-1]) == (0, 0, len(text), len(text))
    shown = "".join(text[s:e] for s, e in zip(starts, ends, strict=True))
    assert shown == ("a b c d" if side == "right" else " f g h i")
    options = EncodeOptions(max_tokens=3, skip_special_tokens=True, truncate=True)
    kept = whole[1:4] if side == "right" else whole[-4:-1]
    assert ids_of(do(EncodeText("m", text, options))) == kept
    assert ids_of(do(EncodeIds("m", pack_tokens(whole[1:-1]), options))) == kept
    with pytest.raises(InvalidArgument, match=r"max_tokens is 2, .* are 2 alone"):
        do(EncodeText("m", text, EncodeOptions(max_tokens=2, truncate=True)))


def test_offsets_are_in_the_text_or_the_rendered_chat(do: Callable[[Work], object]) -> None:
    options = EncodeOptions(with_offsets=True)
    rendered = do(Render("m", Chat(HELLO, True)))
    assert isinstance(rendered, Rendered)
    for item, text in (
        (EncodeText("m", "Grüße, 中文 x", options), "Grüße, 中文 x"),
        (EncodeChat("m", Chat(HELLO, True), options), rendered.text),
    ):
        answer = do(item)
        assert isinstance(answer, Encoded)
        pairs = unpack_tokens(answer.offsets)
        assert len(pairs) == 2 * len(ids_of(answer))
        assert max(pairs) == len(text)
        assert pairs == sorted(pairs) or "中" in text
    assert do(EncodeText("m", "x")).offsets == b""  # type: ignore[attr-defined]


def test_chats_render_and_ids_decode(do: Callable[[Work], object]) -> None:
    rendered = do(Render("m", Chat(HELLO, True)))
    assert isinstance(rendered, Rendered)
    assert rendered.text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    encoded = do(EncodeChat("m", Chat(HELLO, True)))
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
            EncodeChat("m", Chat(HELLO, True), EncodeOptions(max_tokens=9)),
            InvalidArgument,
            "messages",
            "tokens, the limit is 9",
        ),
        (EncodeText("m", "x", EncodeOptions(b"short", 4)), InvalidArgument, "namespace_key", "5"),
        (EncodeText("m", "x", EncodeOptions(KEY, 0)), InvalidArgument, "block_size", "not 0"),
        (EncodeChat("m", Chat([])), InvalidArgument, "messages", "empty"),
        (EncodeChat("m", Chat(HELLO * 4)), InvalidArgument, "messages", "4 messages.* 3"),
        (
            EncodeChat("m", Chat([Message("user", "é" * 600), Message("user", "x" * 900)])),
            InvalidArgument,
            "messages",
            "2,108 bytes.* 2,000",
        ),
        (Render("m", Chat([])), InvalidArgument, "messages", "empty"),
        (
            EncodeUtf8("m", b"abc\xff"),
            InvalidArgument,
            "text_utf8",
            "text_utf8 is no UTF-8: invalid start byte at byte 3",
        ),
        (EncodeUtf8("m", b""), InvalidArgument, "prompt", "empty"),
        (
            EncodeBatch("m", [b"a", b"\xe4\xb8"], first=7),
            InvalidArgument,
            "texts[8]",
            r"texts\[8\] is no UTF-8: .* at byte 0",
        ),
        (EncodeBatch("m", [b"a", b""], first=7), InvalidArgument, "texts[8]", "empty"),
        (
            EncodeBatch("m", [b"a b c"], EncodeOptions(max_tokens=2)),
            InvalidArgument,
            "texts[0]",
            r"^texts\[0\] has 3 tokens, the limit is 2",
        ),
        (EncodeBatch("no", [b"a"]), NotFound, "model", "not served"),
        (
            EncodeIds("m", pack_tokens([1]), EncodeOptions(with_offsets=True)),
            InvalidArgument,
            "with_offsets",
            "no text",
        ),
        (
            EncodeChat("m", Chat(HELLO, tools_json=b" " * 2001)),
            InvalidArgument,
            "messages",
            "limit is 2,000",
        ),
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
            TokenizerService({"m": tokenizer}, LIMITS).do(EncodeChat("m", Chat(HELLO)))
    finally:
        tokenizer.template = template


def test_work_survives_its_frame() -> None:
    for item in (
        EncodeText("m", "é" * 9, EncodeOptions(KEY, 16, 3, True)),
        EncodeChat("m", Chat(HELLO, True)),
        EncodeUtf8("m", b"\xff"),
        EncodeBatch("m", [b"a", b"\xff"], first=3),
        EncodeIds("m", b"\0\0\0\0"),
        Decode("m", b"1234", True),
        Render("m", Chat(HELLO)),
        ReadTable("m"),
    ):
        data = frame(item, 7)
        length, job_id, _ = HEADER.unpack_from(data)
        assert (length + 4, job_id) == (len(data), 7)
        assert decode_work(data[HEADER.size :]) == item
