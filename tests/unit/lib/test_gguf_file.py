"""The GGUF reader: against the `gguf` library's writer, and against broken files."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import StartupError
from headrace.models.files import ModelFiles, from_path
from headrace.models.gguf_file import GgufFile


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "grüße")
    writer.add_array("a.strings", ["x", "", "日本"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_tensor("t", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("u", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors(small: Path) -> None:
    file = GgufFile(small)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["a.number"] == 7
    assert file.metadata["a.float"] == 0.5
    assert file.metadata["a.flag"] is True
    assert file.metadata["a.text"] == "grüße"
    assert file.metadata["a.strings"] == ["x", "", "日本"]
    assert file.metadata["a.ints"] == [1, -2, 3]
    assert file.tensors["t"].shape == (3, 4)
    assert file.tensors["t"].type_name == "F32"
    values = np.frombuffer(file.raw("t"), np.float32).reshape(3, 4)
    assert (values == np.arange(12).reshape(3, 4)).all()
    assert np.frombuffer(file.raw("u"), np.float16).tolist() == [0, 1, 2, 3, 4]


def test_type_sizes_agree_with_the_library() -> None:
    from headrace.models.gguf_file import TENSOR_TYPES

    for number, (name, per_block, block_len) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == (per_block, block_len)


def test_the_default_model(smollm2: ModelFiles) -> None:
    file = GgufFile(smollm2.path)
    assert file.metadata["general.architecture"] == "llama"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert file.tensors["token_embd.weight"].shape == (49152, 576)


@pytest.mark.parametrize("keep", [0, 3, 10, 30, 100, -25, -60])
def test_truncated_anywhere_is_a_clear_error(small: Path, keep: int) -> None:
    data = small.read_bytes()
    small.write_bytes(data[:keep])
    with pytest.raises(StartupError, match=r"small\.gguf"):
        GgufFile(small)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_corrupted_header_never_escapes_as_another_error(
    small: Path, position: int, value: int
) -> None:
    data = bytearray(small.read_bytes())
    data[min(position, len(data) - 1)] = value
    broken = small.with_name("broken.gguf")
    broken.write_bytes(data)
    with suppress(StartupError):
        GgufFile(broken)


def test_models_are_found_and_named(small: Path, tmp_path: Path) -> None:
    assert from_path(small).name == "small"
    assert from_path(tmp_path).path == small
    assert from_path(small, "my/model").name == "my/model"
    with pytest.raises(StartupError, match="no model at"):
        from_path(tmp_path / "nothing")
    with pytest.raises(StartupError, match="model name"):
        from_path(small, "bad name{}")
    (tmp_path / "two.gguf").write_bytes(b"")
    with pytest.raises(StartupError, match=r"2 \.gguf files"):
        from_path(tmp_path)


def test_digests_depend_on_content(small: Path) -> None:
    before = from_path(small)
    revision, digest = before.revision(), before.tokenizer_digest()
    assert before.revision() == revision
    data = bytearray(small.read_bytes())
    data[-1] ^= 1
    small.write_bytes(data)
    assert from_path(small).revision() != revision
    assert from_path(small).tokenizer_digest() == digest
