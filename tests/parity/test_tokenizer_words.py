"""Words and normalized texts against Hugging Face's `tokenizers`, step by step."""

from __future__ import annotations

import json
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from services.tokenizer.backends.base import Words
from services.tokenizer.backends.normalizers import from_component
from services.tokenizer.backends.pre_tokenizers import PRE_TOKENIZERS, from_components
from services.tokenizer.backends.pre_tokenizers.components import GGUF_COMPONENTS
from tests.parity.tokenizer_parts import cut_by_oracle
from tests.vocabularies import folder

#: Characters that patterns tell apart, and some that few expect.
HARD = [
    *(
        "  \n\r\tabzABZ'019.,!/$~éÄßſKǅʕʰ中あア・ーー゛、。　한ا\u0301\u0300२²½Ⅷ①\u200d\u200b\0\x1c"
        "\x85\xa0\u2028"
        "\u3097😀🏽\u0378\u088f\u0558\U00011de0\U00012550\u061d\u166d\U000111c9\ufffd\u2581ª"
    ),
    "'s",
    "'S",
    "'ſ",
    "'ll",
    "'Re",
    "  \n ",
    "12345",
]
TEXT = st.lists(st.sampled_from(HARD), max_size=30).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=40
)


def _split(pattern: dict[str, str], behavior: str, invert: bool) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
OTHERS: dict[str, tuple[dict[str, Any], ...]] = {
    **GGUF_COMPONENTS,
    **{
        f"split {behavior} {invert}": (_split({"Regex": r"\s|\p{N}"}, behavior, invert),)
        for behavior in BEHAVIORS
        for invert in (False, True)
    },
    "string": (_split({"String": "a "}, "MergedWithNext", False),),
    "sets": (_split({"Regex": r"[^\s\p{Lu}\p{Lo}]+?|(?:\p{Ll}|[\-!&~|])++"}, "Isolated", False),),
    "punctuation": ({"type": "Punctuation", "behavior": "MergedWithPrevious"},),
    "digits": ({"type": "Digits", "individual_digits": False},),
    "bert": ({"type": "BertPreTokenizer"},),
    "spaces": ({"type": "WhitespaceSplit"},),
}
#: Falcon's Digits cuts inside characters, where the ids don't show it.
EXACT = {name: entry for name, entry in PRE_TOKENIZERS.items() if name != "falcon"}
CASES: dict[str, tuple[Words, tuple[dict[str, Any], ...]]] = {
    **{name: (entry, entry.huggingface) for name, entry in EXACT.items()},
    **{name: (from_components(parts, "test"), parts) for name, parts in OTHERS.items()},
}


def words_of(words: Words, text: str, **window: int) -> list[str]:
    return [word for some in words.words(text, **window) for word in some]


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=300, deadline=None)
@given(text=TEXT)
@example(text="中漢AAAA Ab don't 'ſ")
def test_words(name: str, text: str) -> None:
    words, components = CASES[name]
    expected = cut_by_oracle(components, text)
    assert words_of(words, text) == expected
    # A window's end changes nothing, wherever it falls.
    for window_len in (1, 3, 8):
        assert words_of(words, text, window_len=window_len) == expected


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_windows_of_falcon(text: str) -> None:
    falcon = PRE_TOKENIZERS["falcon"]
    whole = words_of(falcon, text)
    assert "".join(whole) == text
    for window_len in (1, 3, 8):
        assert words_of(falcon, text, window_len=window_len) == whole


@pytest.mark.parametrize("name", CASES)
def test_code_points_are_cut_alike(name: str) -> None:
    """Where the class of code points changes, in the basic plane's scripts, and a sample."""
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    runs = regex.finditer(r"\p{L}+|\p{N}+|\s+|[^\p{L}\p{N}\s]+", everything)
    ends = [ord(everything[at]) for run in runs for at in (run.start(), run.end() - 1)]
    changes = [code for end in ends for code in range(max(0, end - 1), min(end + 2, 0x110000))]
    assert_cut_alike(name, {*changes, *range(0x800), *range(0, 0x110000, 211)})


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_code_points_are_cut_alike(name: str) -> None:
    assert_cut_alike(name, set(range(0x110000)))


def assert_cut_alike(name: str, codes: set[int]) -> None:
    """Each beside a letter, a digit, a space and a sign, so that its class shows."""
    words, components = CASES[name]
    ordered = sorted(codes.difference(range(0xD800, 0xE000)))
    for start in range(0, len(ordered), 4096):
        some = ordered[start : start + 4096]
        text = "".join(f"a{chr(code)}1{chr(code)}!{chr(code)} " for code in some)
        assert words_of(words, text) == cut_by_oracle(components, text), (
            f"between U+{some[0]:X} and U+{some[-1]:X}"
        )


def _bert(**options: Any) -> dict[str, Any]:
    plain = {"clean_text": True, "handle_chinese_chars": True, "lowercase": True}
    return {"type": "BertNormalizer", "strip_accents": None, **plain, **options}


NORMALIZERS: dict[str, dict[str, Any]] = {
    **{
        kind: {"type": kind}
        for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt")
    },
    "strip": {"type": "Strip", "strip_left": True, "strip_right": True},
    "left": {"type": "Strip", "strip_left": True, "strip_right": False},
    "bert": _bert(),
    "cased bert": _bert(lowercase=False),
    "accents": _bert(lowercase=False, strip_accents=True, clean_text=False),
    "regex": {"type": "Replace", "pattern": {"Regex": " {2,}|\\n"}, "content": "$0"},
    "string": {"type": "Replace", "pattern": {"String": "a"}, "content": "bb"},
    "prepend": {"type": "Prepend", "prepend": "\u2581"},
    "sequence": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]},
    "charsmap": json.loads((folder("e5") / "tokenizer.json").read_bytes())["normalizer"],
}


def normalizers(name: str) -> tuple[Any, Any]:
    as_json = json.loads(Tokenizer(models.BPE()).to_str())
    as_json["normalizer"] = NORMALIZERS[name]
    oracle = Tokenizer.from_str(json.dumps(as_json)).normalizer
    assert oracle is not None
    return from_component(NORMALIZERS[name], "test"), oracle.normalize_str


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalized_text(name: str) -> None:
    ours, oracle = normalizers(name)

    @settings(max_examples=300, deadline=None)
    @given(text=TEXT | st.text(st.characters(categories=["Mn", "Mc", "Lo", "Lu"]), max_size=20))
    @example(text="ΑΣ\r\n\r\n e\u0301\u0316")
    def check(text: str) -> None:
        assert ours(text) == oracle(text)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMALIZERS)
def test_all_code_points_are_normalized_alike(name: str) -> None:
    ours, oracle = normalizers(name)
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            for text in (chr(code), f"a{chr(code)}b", f"a\u0301{chr(code)}\u0334"):
                assert ours(text) == oracle(text), f"U+{code:X}"
