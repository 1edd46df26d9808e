"""What GGUF metadata says about a tokenizer, and which of it is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import StartupError
from headrace.models.files import ModelFiles, from_path
from services.tokenizer.backends import read_spec
from services.tokenizer.backends.pre_tokenizers import PRE_TOKENIZERS

GOOD: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "</s>", "<t>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 3, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.eos_token_id": 4,
    "tokenizer.ggml.eot_token_id": 3,
    "tokenizer.ggml.add_bos_token": True,
}


def write_gguf(path: Path, metadata: dict[str, Any]) -> ModelFiles:
    """A GGUF file with no tensors."""
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata))
    for key, value in metadata.items():
        data += _string(key) + _value(value)
    path.write_bytes(data)
    return ModelFiles("m", "gguf", path)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    items = [_value(item) for item in value]
    kind = items[0][:4]
    return (
        struct.pack("<I", 9)
        + kind
        + struct.pack("<Q", len(items))
        + b"".join(item[4:] for item in items)
    )


def test_metadata_is_read(tmp_path: Path) -> None:
    spec = read_spec(write_gguf(tmp_path / "m.gguf", GOOD))
    assert spec.pre_tokenizer is PRE_TOKENIZERS["gpt2"]
    assert spec.merges == [("a", "b")]
    assert [(t.content, t.is_special) for t in spec.added] == [
        ("<s>", True),
        ("</s>", True),
        ("<t>", False),
    ]
    assert spec.prefix_ids == (3,)
    assert spec.suffix_ids == ()
    assert spec.eos_token_ids == (4, 3)
    assert spec.chat_template is None
    assert spec.named_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model", "rwkv", "tokenizer model 'rwkv' is not supported"),
        ("pre", "chameleon", "pre-tokenizer 'chameleon' is not supported"),
        ("pre", None, "tokenizer.ggml.pre is missing"),
        ("tokens", 3, "tokenizer.ggml.tokens is malformed"),
        ("token_type", [1], "6 tokens have 1 types"),
        ("token_type", [1, 1, 1, 3, 6, 4], r"token types \[6\] are not supported"),
        ("merges", ["ab"], "'ab' is not a pair"),
        ("eos_token_id", 17, "eos_token_id is 17, of 6 tokens"),
        ("tokens", [1, 2, 3, 4, 5, 6], "malformed"),
    ],
)
def test_what_is_not_known_or_wrong_is_named(
    key: str, value: Any, named: str, tmp_path: Path
) -> None:
    metadata = {**GOOD, f"tokenizer.ggml.{key}": value}
    files = write_gguf(tmp_path / "m.gguf", {k: v for k, v in metadata.items() if v is not None})
    with pytest.raises(StartupError, match=named):
        read_spec(files)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_a_bad_tokenizer_json_is_a_clear_error(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StartupError, match=str(tmp_path)):
        read_spec(ModelFiles("m", "huggingface", tmp_path))


def test_a_tokenizer_alone_is_a_model(tmp_path: Path) -> None:
    file = tmp_path / "o200k_base.tiktoken"
    file.write_bytes(b"YQ== 0\nYg== 1\nYWI= 2\n")
    for path in (tmp_path, file):
        files = from_path(path, "m")
        spec = read_spec(files)
        assert spec.tokens == ["a", "b", "ab"]
        assert spec.token_ranks == [0.0, 1.0, 2.0]
        assert spec.pre_tokenizer is PRE_TOKENIZERS["o200k"]
        assert len({files.revision(), files.tokenizer_digest()}) == 2
    digest = from_path(file).tokenizer_digest()
    file.write_bytes(b"YQ== 0\n")
    assert from_path(file).tokenizer_digest() != digest


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("strange.tiktoken", b"YQ== 0\n", "its pattern is not known"),
        ("o200k_base.tiktoken", b"", "no ranks"),
        ("o200k_base.tiktoken", b"!! 0\n", "malformed"),
        ("tekken.json", b"{}", "malformed"),
        ("tokenizer.model", b"", "the model type|no pieces"),
        ("tokenizer.model", b"\xff\xff", "can't be read"),
    ],
)
def test_a_bad_tokenizer_file_is_a_clear_error(
    name: str, content: bytes, named: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StartupError, match=named) as caught:
        read_spec(from_path(tmp_path / name, "m"))
    assert name in str(caught.value)


def test_several_tokenizers_must_be_told_apart(tmp_path: Path) -> None:
    for name in ("a.tiktoken", "b.model.v3"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(StartupError, match="several tokenizers"):
        read_spec(from_path(tmp_path, "m"))
