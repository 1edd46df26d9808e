"""Text of ids, in every vocabulary: as its library has it, at once and token by token."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.blocks import pack_tokens
from services.gateway.detokenizer import Detokenizer, DetokenizerTable, TableContent
from services.tokenizer.backends.base import AddedToken, TokenizerSpec
from services.tokenizer.backends.token_texts import TokenTexts, sentencepiece_texts
from tests.parity.plain_specs import NAMES, oracle_of, spec_of, texts_of
from tests.vocabularies import folder

WRONG = "\N{REPLACEMENT CHARACTER}"
MODELS = ("tokenizer.model.v1", "tokenizer.model.v3")


@cache
def processor_of(name: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder("mistral") / name))


@cache
def model_texts(name: str) -> TokenTexts:
    processor = processor_of(name)
    tokens = [processor.id_to_piece(at) for at in range(processor.vocab_size())]
    hidden = [at for at in range(len(tokens)) if processor.is_control(at)]
    added = [AddedToken(at, tokens[at], True) for at in hidden]
    return sentencepiece_texts(
        TokenizerSpec(
            name, "sentencepiece_bpe", tokens, added, byte_fallback=True, strips_first_space=True
        )
    )


@cache
def table_of(name: str) -> DetokenizerTable:
    texts = model_texts(name) if name in MODELS else texts_of(name)
    first = sorted(texts.first)
    return DetokenizerTable(
        TableContent(
            name,
            b"".join(texts.pieces),
            b"".join(len(piece).to_bytes(2, "little") for piece in texts.pieces),
            bytes(at in texts.special_ids for at in range(len(texts.pieces))),
            replaces_each_byte=texts.replaces_each_byte,
            strips_first_space=texts.strips_first_space,
            first_ids=pack_tokens(first),
            first_data=b"".join(texts.first[at] for at in first),
            first_lengths=b"".join(len(texts.first[at]).to_bytes(2, "little") for at in first),
        )
    )


@cache
def byte_ids(name: str) -> tuple[int, ...]:
    """Tokens that stand for one byte, by name."""
    if name in MODELS:
        processor = processor_of(name)
        return tuple(at for at in range(processor.vocab_size()) if processor.is_byte(at))
    spec = spec_of(name)
    named = [f"<0x{value:02X}>" for value in range(256)] if spec.byte_fallback else []
    places = {token: at for at, token in enumerate(spec.tokens)}
    return tuple(places[token] for token in named)


@cache
def partial_ids(name: str) -> tuple[int, ...]:
    """Tokens that are part of a character, at an end at least."""
    pieces = (model_texts(name) if name in MODELS else texts_of(name)).pieces
    return tuple(at for at, p in enumerate(pieces) if WRONG in p.decode("utf-8", "replace"))


def random_ids(name: str, seed: int, max_len: int = 24) -> list[int]:
    """Any tokens, frequent ones, special ones, ones that are parts of characters, and padding."""
    rng = random.Random(seed)
    texts = model_texts(name) if name in MODELS else texts_of(name)
    size = len(texts.pieces)
    special, partial = sorted(texts.special_ids), partial_ids(name)
    pick = [
        lambda: rng.randrange(size),
        lambda: rng.randrange(min(size, 1500)),
        lambda: rng.choice(special),
        lambda: rng.choice(partial) if partial else rng.randrange(size),
        lambda: rng.choice(partial) if partial else rng.randrange(size),
    ]
    return [rng.choice(pick)() for _ in range(rng.randrange(max_len))]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 32), skip=st.booleans())
def test_text_is_that_of_tokenizers(name: str, seed: int, skip: bool) -> None:
    """Byte tokens apart: see the next test."""
    wrong = set(byte_ids(name))
    ids = [token_id for token_id in random_ids(name, seed) if token_id not in wrong]
    expected = oracle_of(name).decode(ids, skip_special_tokens=skip)
    assert texts_of(name).decode(ids, skip_special=skip) == expected


@pytest.mark.parametrize("name", ["gemma3", "llama2"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=6), wrong=st.binary(max_size=5))
def test_bytes_are_those_of_tokenizers_where_they_are_characters(
    name: str, text: str, wrong: bytes
) -> None:
    ids_of, decode = byte_ids(name), texts_of(name).decode
    ids = [ids_of[byte] for byte in f"_{text}".encode()]
    assert decode(ids, skip_special=False) == oracle_of(name).decode(ids) == f"_{text}"
    # There, one wrong byte makes the whole run wrong.
    try:
        wrong.decode()
    except UnicodeDecodeError:
        ids += [ids_of[byte] for byte in wrong]
        assert oracle_of(name).decode(ids) == WRONG * len(ids)
        assert decode(ids, skip_special=False).startswith(f"_{text}")


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 32), tail=st.binary(max_size=5))
def test_text_is_that_of_sentencepiece(name: str, seed: int, tail: bytes) -> None:
    """Apart from: unknown tokens, that it shows as " ⁇ "; control tokens between bytes, that
    end a character there; a first byte that is a space, that is not dropped there."""
    processor = processor_of(name)
    hidden = {processor.unk_id(), *model_texts(name).special_ids}
    ids = [at for at in random_ids(name, seed) if at not in hidden]
    ids += [byte_ids(name)[byte] for byte in tail]
    text = model_texts(name).decode(ids, skip_special=True)
    expected = processor.decode(ids)
    assert model_texts(name).decode([1, *ids, 2], skip_special=True) == text
    if ids[:1] == [byte_ids(name)[0x20]]:
        expected = expected.removeprefix(" ")
    assert text == expected


@pytest.mark.parametrize("name", [*NAMES, *MODELS])
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 1 << 32), skip=st.booleans(), goes_on=st.booleans())
def test_streamed_text_is_the_text(name: str, seed: int, skip: bool, goes_on: bool) -> None:
    texts = model_texts(name) if name in MODELS else texts_of(name)
    if goes_on:
        texts = replace(texts, first={}, strips_first_space=False)
    rng = random.Random(seed)
    ids = random_ids(name, seed)
    ids += [rng.choice(byte_ids(name)) for _ in range(8) if byte_ids(name)]
    for step in (1, rng.randrange(2, 9)):
        detokenizer = Detokenizer(table_of(name), goes_on=goes_on, skip_special=skip)
        text = ""
        for start in range(0, len(ids), step):
            text += detokenizer.push(ids[start : start + step])
            so_far = texts.decode(ids[: start + step], skip_special=skip)
            # What is held back is the beginning of one character.
            assert so_far.startswith(text)
            assert len(so_far) - len(text) <= 3
        assert text + detokenizer.flush() == texts.decode(ids, skip_special=skip)


@pytest.mark.parametrize("name", NAMES)
def test_every_token_alone(name: str) -> None:
    oracle, texts = oracle_of(name), texts_of(name)
    wrong = set(byte_ids(name))
    step = max(1, len(texts.pieces) // 20_000)
    for at in range(0, len(texts.pieces), step):
        if at not in wrong:
            expected = oracle.decode([at], skip_special_tokens=False)
            assert texts.decode([at], skip_special=False) == expected


def test_whisper_s_special_tokens_are_hidden_and_what_lies_beyond_shows_nothing() -> None:
    texts, content = texts_of("whisper"), (folder("whisper") / "tokenizer.json").read_bytes()
    special = {t["id"] for t in json.loads(content)["added_tokens"] if t["special"]}
    assert texts.special_ids == special
    ids = [*sorted(special), len(texts.pieces), len(texts.pieces) + 1500]
    assert texts.decode(ids, skip_special=True) == ""
    detokenizer = Detokenizer(table_of("whisper"))
    assert [detokenizer.push([at]) for at in ids] == [""] * len(ids)
