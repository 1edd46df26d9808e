"""GGUF tensors: our unpacking equals the library's; damaged files are refused by name."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch

from headrace.errors import StartupError
from headrace.models.files import from_path
from headrace.models.gguf_file import TENSOR_TYPES
from services.worker import model_config
from services.worker.engines.torch.device import place
from services.worker.engines.torch.engine import load
from services.worker.engines.torch.weights.gguf import GgufCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

    from headrace.models.files import ModelFiles

Types = gguf.GGMLQuantizationType
ROWS, COLUMNS = 12, 256


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, Types]]) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(kind: Types, rows: int = ROWS) -> np.ndarray:
    """Blocks of any bits, with the exponents of 16-bit scales kept from NaN."""
    random = np.random.default_rng(int(kind))
    elements, length = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (rows * COLUMNS // elements, length), dtype=np.uint8)
    if kind in (Types.Q4_0, Types.Q5_0, Types.Q8_0):
        raw[:, 1] &= 0xBF
    elif kind in (Types.Q4_1, Types.Q5_1, Types.Q4_K, Types.Q5_K):
        raw[:, [1, 3]] &= 0xBF
    elif kind in (Types.Q6_K, Types.Q3_K):
        raw[:, -1] &= 0xBF
    elif kind == Types.Q2_K:
        raw[:, [-1, -3]] &= 0xBF
    return raw.reshape(rows, -1)


@pytest.mark.parametrize(
    "kind",
    [Types[name] for name, elements, _ in TENSOR_TYPES.values() if elements > 1],
    ids=lambda kind: kind.name,
)
@pytest.mark.parametrize("rows", [ROWS, 1100])
def test_dequantizes_as_the_library(tmp_path: Path, kind: Types, rows: int) -> None:
    blocks = random_blocks(kind, rows)
    write_gguf(tmp_path / "m.gguf", {"w": (blocks, kind)})
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))

    checkpoint = GgufCheckpoint(tmp_path / "m.gguf")

    assert checkpoint.shapes == {"w": (rows, COLUMNS)}
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(rows, COLUMNS, dtype=dtype)
        checkpoint.read_into("w", out)
        assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_reads_plain_types(tmp_path: Path, dtype: type) -> None:
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    kind = Types.F32 if dtype is np.float32 else Types.F16
    write_gguf(tmp_path / "m.gguf", {"w": (values, kind)})
    out = torch.empty(2, 3)
    GgufCheckpoint(tmp_path / "m.gguf").read_into("w", out)
    assert np.array_equal(out.numpy(), values.astype(np.float32))


def _start(files: ModelFiles) -> None:
    load(files, model_config.read(files), place("cpu", "float32"), lambda *_: None)


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.02])
def test_a_truncated_model_is_named(smollm2: ModelFiles, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "cut.gguf"
    content = smollm2.path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(StartupError, match=r"cut\.gguf: .*(truncated|cut off|corrupted)"):
        _start(from_path(path))


def test_a_nan_in_a_model_is_named(smollm2: ModelFiles, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    content = bytearray(smollm2.path.read_bytes())
    entry = GgufCheckpoint(smollm2.path)._file.tensors["blk.0.attn_k.weight"]
    # The scale of the tensor's 100th block of Q4_1.
    struct.pack_into("<e", content, entry.offset + 100 * 20, float("nan"))
    path.write_bytes(content)
    with pytest.raises(StartupError, match=r"bad\.gguf: tensor blk\.0\.attn_k\.weight .*NaN"):
        _start(from_path(path))


def test_a_missing_tensor_is_named(smollm2: ModelFiles, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    content = smollm2.path.read_bytes()
    assert content.count(b"blk.7.attn_k.weight") == 1
    path.write_bytes(content.replace(b"blk.7.attn_k.weight", b"blk.7.attn_z.weight"))
    with pytest.raises(StartupError, match=r"layers\.7\.self_attn\.k_proj is missing"):
        _start(from_path(path))
