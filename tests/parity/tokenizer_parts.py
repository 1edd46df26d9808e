"""What the tokenizer's parity tests share: Hugging Face's `tokenizers` as oracle, and text."""

from __future__ import annotations

import json
import random
import sysconfig
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from services.tokenizer.backends import TokenizerSpec
from services.tokenizer.backends.pre_tokenizers import PreTokenizer

DATA = Path(__file__).resolve().parents[1] / "data"


def oracle_of(spec: TokenizerSpec) -> Tokenizer:
    """Hugging Face's tokenizer with the vocabulary and merges of `spec`."""
    vocab = {token: token_id for token_id, token in enumerate(spec.tokens) if token}
    oracle = Tokenizer(
        models.BPE(vocab=vocab, merges=list(spec.merges), ignore_merges=spec.ignore_merges)
    )
    as_json = json.loads(oracle.to_str())
    assert isinstance(spec.pre_tokenizer, PreTokenizer)
    as_json["pre_tokenizer"] = component_of(spec.pre_tokenizer.huggingface)
    oracle = Tokenizer.from_str(json.dumps(as_json))
    oracle.decoder = decoders.ByteLevel()
    for token in spec.added:
        added = AddedToken(token.content, normalized=False, special=token.is_special)
        if token.is_special:
            oracle.add_special_tokens([added])
        else:
            oracle.add_tokens([added])
    return oracle


def component_of(components: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Components in our shortest form as a `pre_tokenizer` of a tokenizer.json."""
    defaults: dict[str, dict[str, Any]] = {
        "ByteLevel": {"use_regex": True, "add_prefix_space": False, "trim_offsets": True},
        "Split": {"invert": False},
    }
    parts = [{**defaults.get(part["type"], {}), **part} for part in components]
    return {"type": "Sequence", "pretokenizers": parts}


def cut_by_oracle(components: Sequence[dict[str, Any]], text: str) -> list[str]:
    """The words into which the oracle cuts `text`."""
    as_json = json.loads(Tokenizer(models.BPE()).to_str())
    as_json["pre_tokenizer"] = component_of(components)
    cutter = Tokenizer.from_str(json.dumps(as_json)).pre_tokenizer
    assert isinstance(cutter, pre_tokenizers.PreTokenizer)
    # Offsets count characters; the words themselves may be in byte-level letters.
    return [text[start:end] for _, (start, end) in cutter.pre_tokenize_str(text)]


def mixed_text(min_bytes: int, seed: int = 7) -> Iterator[str]:
    """Documents of code, of many scripts, of oddities; the same ones every time."""
    rng = random.Random(seed)
    makers = [_code(rng), _scripts(rng), _oddities(rng), _letters(rng)]
    length = 0
    while length < min_bytes:
        for maker in makers:
            document = next(maker)
            length += len(document.encode())
            yield document


def _code(rng: random.Random) -> Iterator[str]:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    while True:
        yield rng.choice(paths).read_text("utf-8", "replace")


def _scripts(rng: random.Random) -> Iterator[str]:
    lines = (DATA / "scripts.txt").read_text("utf-8").splitlines()
    words = " ".join(lines).split(" ")
    while True:
        page = [rng.choice((rng.choice(lines), *rng.choices(words, k=3))) for _ in range(300)]
        yield "".join(line + rng.choice((" ", "\n", "", ", ", " 12 ")) for line in page)


def _oddities(rng: random.Random) -> Iterator[str]:
    """White space runs, digit runs, controls, punctuation, contractions, special tokens."""
    spaces = " \t\n\r\v\f\x1c\x85\xa0\u1680\u2003\u2028\u3000\u200b\ufeff"
    digits = "0123456789²½Ⅷ٣१๑１𝟗"
    while True:
        parts = []
        for _ in range(400):
            parts += [
                "".join(rng.choices(spaces, k=rng.randrange(9))),
                " " * rng.choice((0, 1, 2, 3, 40)) + "\n" * rng.choice((0, 1, 5)),
                "".join(rng.choices(digits, k=rng.choice((1, 2, 5, 60)))),
                "".join(map(chr, rng.choices(range(0x20), k=rng.randrange(3)))),
                rng.choice(("I'll", "it's", "'RE", "don't've", "’s", "''s", "'", "'l 'r")),
                rng.choice(("<|im_start|>", "<|im_end|>", "<|im_", "<|endoftext|>x", "<filename>")),
                "".join(rng.choices("!?.,;:-_=+*/\\|()[]{}<>@#$%^&~`\"'", k=rng.randrange(7))),
                rng.choice(("", "word", "Ünï", "a\u0301", "e\u0301\u0327", "👩🏽‍🚀", "🇩🇪")),
            ]
        yield "".join(parts)


def _letters(rng: random.Random) -> Iterator[str]:
    """Random runs of characters from all of Unicode's blocks."""
    assigned = [
        chr(code)
        for code in range(0x20, 0x110000)
        if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")
    ]
    while True:
        page = []
        for _ in range(300):
            start = rng.randrange(len(assigned))
            page += rng.choices(assigned[start : start + 200], k=rng.randrange(1, 12))
            page.append(rng.choice((" ", "", "\n", "7")))
        yield "".join(page)
