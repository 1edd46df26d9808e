"""Every vocabulary that tests can get, against what its makers tokenize with: identical ids.

The oracles: `tokenizers` for a tokenizer.json, llama.cpp's vectors for GGUF (made with
Hugging Face's tokenizers, no BOS or EOS), `sentencepiece` for .model files, and for
tekken.json a plain reading of what tiktoken does.
"""

from __future__ import annotations

import base64
import json
import random
from functools import cache
from itertools import pairwise

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.blocks import unpack_tokens
from headrace.models.files import ModelFiles, from_path
from services.tokenizer.backends import Backend, load_backend, read_spec
from services.tokenizer.backends.token_texts import BYTE_CHARS
from tests.parity.tokenizer_parts import mixed_text
from tests.vocabularies import LLAMA_CPP_VECTORS, VOCABULARIES, folder

NAMES = [name for name in VOCABULARIES if name not in ("llama-cpp", "mistral")]
#: Those whose words and merges others have too get the long tests only when all is run.
LIKE_OTHERS = ("llama3_1", "deepseek_llm", "gpt4o")
LONG_NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in NAMES
]
#: Characters; the longer one when all is run.
CORPUS_LENS = [1_000_000, pytest.param(4_000_000, marks=pytest.mark.slow)]
LONG_LEN = 100_000

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(
    "ab Z'\n\tre1²<|im_start|>٣\u3000é👍\u2581\u0301\u200dはا\u093f한中ſ", max_size=60
)


@cache
def backend_of(name: str) -> Backend:
    return load_backend(read_spec(from_path(folder(name))))


@cache
def oracle_of(name: str) -> Tokenizer:
    oracle = Tokenizer.from_file(str(folder(name) / "tokenizer.json"))
    oracle.no_truncation()
    oracle.no_padding()
    return oracle


@pytest.fixture(autouse=True, scope="module")
def one_at_a_time() -> object:
    """Vocabularies are large: only those of this module's current test stay loaded."""
    yield
    backend_of.cache_clear()
    oracle_of.cache_clear()


@pytest.fixture(scope="module", params=CORPUS_LENS)
def corpus(request: pytest.FixtureRequest) -> list[str]:
    texts = list(mixed_text(request.param))
    # What a lone surrogate becomes on its way to us.
    return [*texts, "lone \ud800 and \udfff".encode("utf-8", "replace").decode(), "\ufffd" * 9]


def assert_same(name: str, text: str) -> None:
    ids = unpack_tokens(backend_of(name).encode(text))
    expected = oracle_of(name).encode(text, add_special_tokens=False).ids
    assert_ids(ids, expected, text)


def assert_ids(ids: list[int], expected: list[int], text: str) -> None:
    if ids != expected:
        pairs = zip([*ids, -1], [*expected, -1], strict=False)
        at = next(i for i, (one, other) in enumerate(pairs) if one != other)
        pytest.fail(
            f"token {at} of {text[:80]!a}: {ids[at - 3 : at + 6]}, "
            f"expected {expected[at - 3 : at + 6]}"
        )


@pytest.mark.parametrize("name", LONG_NAMES)
def test_ids_of_a_corpus(name: str, corpus: list[str]) -> None:
    backend_of.cache_clear()
    oracle_of.cache_clear()
    assert sum(len(text.encode()) for text in corpus) >= 1_000_000
    for text in corpus:
        assert_same(name, text)


@pytest.mark.parametrize("name", LONG_NAMES)
def test_ids_of_long_words(name: str) -> None:
    rng = random.Random(3)
    letters = "".join(rng.choices("etaoinshrdlu", k=LONG_LEN))
    for word in ("a" * LONG_LEN, letters, " " * LONG_LEN, "=" * LONG_LEN, "中" * 34_000, "7" * 999):
        assert_same(name, f"before {word} behind")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_ids_of_random_text(name: str, text: str) -> None:
    assert_same(name, text)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_of_text_with_added_tokens(name: str, data: st.DataObject) -> None:
    added = [token.content for token in oracle_of(name).get_added_tokens_decoder().values()]
    parts = st.sampled_from(added) | st.text(" ab\n<|>.é", max_size=4)
    assert_same(name, "".join(data.draw(st.lists(parts, max_size=12))))


@pytest.mark.parametrize("name", NAMES)
def test_ids_around_a_text(name: str) -> None:
    spec = read_spec(from_path(folder(name)))
    inner = oracle_of(name).encode("a b", add_special_tokens=False).ids
    whole = oracle_of(name).encode("a b", add_special_tokens=True).ids
    assert [*spec.prefix_ids, *inner, *spec.suffix_ids] == whole


@pytest.mark.parametrize("name", LLAMA_CPP_VECTORS)
def test_vectors_of_llama_cpp(name: str) -> None:
    path = folder("llama-cpp") / f"{name}.gguf"
    inputs = path.with_suffix(".gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    expected = path.with_suffix(".gguf.out").read_text("utf-8").split("\n")
    backend = load_backend(read_spec(from_path(path)))
    assert len(inputs) > 40
    for text, line in zip(inputs, expected, strict=False):
        assert_ids(unpack_tokens(backend.encode(text)), [*map(int, line.split())], text)


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_ids_of_a_sentencepiece_model(version: str, corpus: list[str]) -> None:
    import sentencepiece

    path = folder("mistral") / f"tokenizer.model.{version}"
    oracle = sentencepiece.SentencePieceProcessor(str(path))
    spec = read_spec(from_path(path))
    backend = load_backend(spec)
    assert spec.prefix_ids == (oracle.bos_id(),)
    # `sentencepiece` knows no control tokens in a text, and ends a text at a zero byte.
    for text in corpus[:: 4 if version == "v1" else 40]:
        plain = text.replace("\0", "")
        assert_ids(
            unpack_tokens(backend.encode(plain, parse_added=False)), oracle.encode(plain), plain
        )


def tiktoken_encode(ranks: dict[bytes, int], pattern: str, text: str) -> list[int]:
    """openai/tiktoken's README has it so: merge the pair whose join ranks lowest."""
    ids = []
    for word in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            rank, at = min(
                (ranks.get(one + other, 1 << 60), at)
                for at, (one, other) in enumerate(pairwise(parts))
            )
            if rank == 1 << 60:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_ids_of_tekken(corpus: list[str]) -> None:
    path = folder("mistral") / "tekken_240911.json"
    content = json.loads(path.read_bytes())
    listed = content["vocab"][: 131_072 - 1000]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] + 1000 for entry in listed}
    backend = load_backend(read_spec(from_path(path)))
    for text in corpus[::80]:
        text = "".join(char for char in text if char.isprintable() or char.isspace())[:20_000]
        expected = tiktoken_encode(ranks, content["config"]["pattern"], text)
        assert_ids(unpack_tokens(backend.encode(text, parse_added=False)), expected, text)
    assert unpack_tokens(backend.encode("[INST]a[/INST]")) == [3, ranks[b"a"], 4]


def test_a_rank_file_gives_the_ids_of_its_json(tmp_path: object) -> None:
    from pathlib import Path

    directory = Path(str(tmp_path))
    vocab = json.loads((folder("gpt4o") / "tokenizer.json").read_bytes())["model"]["vocab"]
    spelled = {char: byte for byte, char in enumerate(BYTE_CHARS)}
    lines = []
    for token, rank in vocab.items():
        if rank < 199_998:
            content = bytes(spelled[char] for char in token)
            lines.append(base64.b64encode(content) + b" %d" % rank)
    path = directory / "o200k_base.tiktoken"
    path.write_bytes(b"\n".join(lines))
    backend = load_backend(read_spec(ModelFiles("m", "huggingface", path)))
    for text in list(mixed_text(200_000, seed=9)):
        plain = text.replace("<|endoftext|>", "")
        expected = oracle_of("gpt4o").encode(plain, add_special_tokens=False).ids
        assert_ids(unpack_tokens(backend.encode(plain)), expected, plain)
