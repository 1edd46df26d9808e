"""Where tokens come from: added tokens, what normalizers change, what is unknown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

import pytest

from services.tokenizer.backends.base import AddedToken, TokenizerSpec
from services.tokenizer.backends.offsets import OffsetFinder
from services.tokenizer.backends.token_texts import (
    byte_level_texts,
    sentencepiece_texts,
    wordpiece_texts,
)

TEXTS = {"byte_level_bpe": byte_level_texts, "wordpiece": wordpiece_texts}


class Words:
    def words(self, text: str) -> Iterator[list[str]]:
        yield re.findall(r"\w+|[^\w\s]", text)


def covered(
    family: str, tokens: list[str], text: str, ids: list[int], **values: object
) -> list[str]:
    """What of `text` each token covers."""
    spec = TokenizerSpec("test", family, tokens, **values)  # type: ignore[arg-type]
    finder = OffsetFinder(spec, TEXTS.get(family, sentencepiece_texts)(spec))
    return [text[start:end] for start, end in finder.find(text, ids)]


def test_parts_of_a_character_cover_it() -> None:
    tokens = ["a", "Ġ", "ðŁĺ", "Ģ", "Ģa"]
    assert covered("byte_level_bpe", tokens, "a 😀a😀", [0, 1, 2, 4, 2, 3]) == [
        "a", " ", "😀", "😀a", "😀", "😀",
    ]  # fmt: skip


def test_bytes_without_a_token_are_left_out() -> None:
    assert covered("byte_level_bpe", ["a", "b", "ab"], "xaxb\x04bxx", [2, 1]) == ["axb", "b"]


def test_added_tokens_cover_the_white_space_they_take() -> None:
    added = [
        AddedToken(0, "<a>", True, lstrip=True, rstrip=True),
        AddedToken(1, "<b>", True),
        AddedToken(2, "<c>", False, normalized=True),
    ]
    tokens = ["<a>", "<b>", "<c>", "x", "Ġ"]
    assert covered(
        "byte_level_bpe", tokens, "x  <a> <b> <C>X", [3, 0, 1, 4, 2, 3],
        added=added, normalizer=str.lower,
    ) == ["x", "  <a> ", "<b>", " ", "<C>", "X"]  # fmt: skip


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def unaccented(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text.lower())
    return "".join(c for c in decomposed if unicodedata.category(c) != "Mn")


def collapsed(text: str) -> str:
    return re.sub(" {2,}", " ", text.replace("\n", " ")).strip(" ").replace(" ", "▁")


def joined(text: str) -> str:
    return re.sub("▁{2,}", "▁", "▁" + re.sub("[ \n\u200b]", "▁", text))


@pytest.mark.parametrize(
    ("normalizer", "text", "expected"),
    [
        (nfc, "ae\u0301é", ["a", "e\u0301", "é"]),
        (unaccented, "Ae\u0301É", ["A", "e", "É"]),
    ],
)
def test_a_normalized_character_covers_what_it_is_made_of(
    normalizer: Callable[[str], str], text: str, expected: list[str]
) -> None:
    tokens = ["a", "é", "e"]
    ids = [0, 1, 1] if normalizer is nfc else [0, 2, 2]
    assert covered("sentencepiece_bpe", tokens, text, ids, normalizer=normalizer) == expected


def test_characters_that_are_taken_out_are_covered_by_none() -> None:
    assert covered(
        "unigram", ["a", "b"], "\va\v\vb\v", [0, 1], normalizer=lambda t: t.replace("\v", "")
    ) == ["a", "b"]  # fmt: skip


def test_spaces_that_become_one_are_covered_together() -> None:
    tokens = ["▁a", "▁", "b"]
    assert covered(
        "unigram", tokens, "  a\n \n a b ", [0, 0, 1, 2],
        normalizer=collapsed, prepend_space="first",
    ) == ["a", "\n \n a", " ", "b"]  # fmt: skip
    # Spaces that each character makes by itself.
    found = covered("unigram", tokens, "a\n\u200b b\u200b", [0, 1, 2, 1], normalizer=joined)
    assert found == ["a", "\n\u200b ", "b", "\u200b"]
    assert covered("unigram", tokens, "a\u200b\u200b", [0, 1], normalizer=joined) == [
        "a", "\u200b\u200b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "expected"),
    [("first", ["a", "a", "<s>", "a"]), ("always", ["a", "a", "<s>", "a", "a"])],
)
def test_a_space_that_was_put_before_covers_the_first_character(
    where: str, expected: list[str]
) -> None:
    ids = [1, 2, 0, 2] if where == "first" else [1, 2, 0, 1, 2]
    assert (
        covered(
            "sentencepiece_bpe",
            ["<s>", "▁", "a"],
            "a<s>a",
            ids,
            added=[AddedToken(0, "<s>", True)],
            prepend_space=where,
        )
        == expected
    )


def test_a_normalizer_may_put_the_space_before() -> None:
    tokens = ["▁", "a", "<0x0A>"]
    assert covered(
        "sentencepiece_bpe", tokens, "a\n\na a", [0, 1, 2, 2, 1, 0, 1],
        normalizer=lambda text: ("▁" + text).replace(" ", "▁"), byte_fallback=True,
    ) == ["a", "a", "\n", "\n", "a", " ", "a"]  # fmt: skip


def test_unknown_characters_in_a_row() -> None:
    tokens = ["<unk>", "a", "中a"]
    assert covered("unigram", tokens, "a中文中aé", [1, 0, 2, 0], unk_id=0) == [
        "a", "中文", "中a", "é",
    ]  # fmt: skip
    apart = covered("sentencepiece_bpe", tokens, "a中文", [1, 0, 0], unk_id=0)
    assert apart == ["a", "中", "文"]
    by_bytes = covered("byte_level_bpe", ["<unk>", "a"], "a中a", [1, 0, 0, 0, 1], unk_id=0)
    assert by_bytes == ["a", "中", "中", "中", "a"]


def test_words_and_unknown_words() -> None:
    tokens = ["[UNK]", "un", "##un", "!", "##"]
    assert covered(
        "wordpiece", tokens, " Ünun  xyz!", [1, 2, 0, 3],
        unk_id=0, normalizer=unaccented, pre_tokenizer=Words(),
    ) == ["Ün", "un", "xyz", "!"]  # fmt: skip


@pytest.mark.parametrize("ids", [[], [0], [0, 1, 0], [1, 0], [0, 99]])
@pytest.mark.parametrize("family", ["byte_level_bpe", "unigram", "wordpiece"])
def test_ids_of_another_text_are_refused(family: str, ids: list[int]) -> None:
    tokens = ["a", "##b" if family == "wordpiece" else "b"]
    assert covered(family, tokens, "ab", [0, 1], pre_tokenizer=Words()) == ["a", "b"]
    with pytest.raises(ValueError, match="token"):
        covered(family, tokens, "ab", ids, pre_tokenizer=Words())
