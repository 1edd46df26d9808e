"""The safetensors reader: what it reads, and that every fault is named."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch

from headrace.errors import StartupError
from services.worker.engines.torch.weights.safetensors import (
    SafetensorsCheckpoint,
    SafetensorsFile,
)

from .conftest import write_raw, write_safetensors

if TYPE_CHECKING:
    from pathlib import Path


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2, 2).half(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "bytes": torch.arange(5, dtype=torch.int8),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    file = SafetensorsFile(tmp_path / "model.safetensors")

    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(file.tensor(name), tensor)
        assert file.tensor(name).dtype == tensor.dtype


def test_reads_data_that_is_not_aligned(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * ((4 - len(header)) % 8 + 1)
    data = torch.tensor([1.0, -2.0])
    write_raw(tmp_path / "m.safetensors", header, data.numpy().tobytes())

    assert torch.equal(SafetensorsFile(tmp_path / "m.safetensors").tensor("a"), data)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FAULTS = {
    "empty JSON list": ([], 0, "not a JSON object"),
    "no JSON": (b"{nonsense", 0, "not JSON"),
    "deep JSON": (b"[" * 100_000, 0, "not JSON"),
    "truncated": ({"a": F32}, 7, "tensor a ends at byte .* it is truncated"),
    "more data": ({"a": F32}, 9, "the tensors end at byte"),
    "overlap": ({"a": F32, "b": F32}, 8, "tensor b .* overlaps"),
    "gap": ({"a": {**F32, "data_offsets": [4, 12]}}, 12, "tensor a .* leaves a gap"),
    "backwards": ({"a": {**F32, "data_offsets": [8, 0]}}, 8, r"data_offsets \[8, 0\]"),
    "negative": ({"a": {**F32, "data_offsets": [-8, 0]}}, 8, "data_offsets"),
    "huge": ({"a": {**F32, "data_offsets": [0, 1 << 70]}}, 8, "data_offsets"),
    "shape": ({"a": {**F32, "shape": [3]}}, 8, "needs 12 bytes, but has 8"),
    "huge shape": ({"a": {**F32, "shape": [1 << 40, 1 << 40]}}, 8, "needs .* but has 8"),
    "negative shape": ({"a": {**F32, "shape": [-2]}}, 8, "has the shape"),
    "float shape": ({"a": {**F32, "shape": [2.0]}}, 8, "has the shape"),
    "dtype": ({"a": {**F32, "dtype": "F31"}}, 8, "dtype 'F31', which is not supported"),
    "dtype list": ({"a": {**F32, "dtype": []}}, 8, "dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "tensor a lacks"),
    "no object": ({"a": 3}, 8, "tensor a lacks"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_names_the_fault(tmp_path: Path, fault: str) -> None:
    header, data_len, message = FAULTS[fault]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    write_raw(path, raw, b"\0" * data_len)

    with pytest.raises(StartupError, match=message) as caught:
        SafetensorsFile(path)

    assert str(path) in str(caught.value)
    assert "fetch it again" in str(caught.value)


@pytest.mark.parametrize("length", [9, 1 << 40, (1 << 64) - 1])
def test_refuses_an_absurd_header_length(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path / "m.safetensors", b"{}", b"", length)
    with pytest.raises(StartupError, match=f"header's length is {length} bytes"):
        SafetensorsFile(tmp_path / "m.safetensors")


@pytest.mark.parametrize("content", [b"", b"\0\0\0"])
def test_refuses_a_file_without_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(StartupError, match=r"m\.safetensors"):
        SafetensorsFile(tmp_path / "m.safetensors")


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": torch.randn(3), "b": torch.randn(2, 2)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StartupError):
            SafetensorsFile(path)


def _sharded(directory: Path, weight_map: object) -> None:
    write_safetensors(directory / "one.safetensors", {"a": torch.ones(2)})
    write_safetensors(directory / "two.safetensors", {"b": torch.ones(3)})
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_reads_shards(tmp_path: Path) -> None:
    _sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert SafetensorsCheckpoint(tmp_path).shapes == {"a": (2,), "b": (3,)}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, "tensor b is missing"),
        ({"a": "none.safetensors"}, r"none\.safetensors"),
        ({"a": "../one.safetensors"}, "file names"),
        ({"a": 3}, "file names"),
        ([], "file names"),
    ],
)
def test_refuses_a_wrong_index(tmp_path: Path, weight_map: object, message: str) -> None:
    _sharded(tmp_path, weight_map)
    with pytest.raises(StartupError, match=message):
        SafetensorsCheckpoint(tmp_path)


def test_refuses_a_tensor_that_is_in_two_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"a": torch.ones(2)})
    with pytest.raises(StartupError, match=r"tensor a is also in one\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_refuses_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="holds no"):
        SafetensorsCheckpoint(tmp_path)


def test_refuses_integers_as_weights(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": torch.ones(2, dtype=torch.int32)})
    with pytest.raises(StartupError, match=r"tensor a is torch\.int32"):
        SafetensorsCheckpoint(tmp_path).read_into("a", torch.empty(2))
