"""A tiny random llama on disk, and writers of model files, good and bad."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

# Before torch: the package sets how OpenMP's threads wait.
import services.worker.engines.torch  # noqa: F401  isort: skip
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TINY = {
    "model_type": "llama",
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A file as the format's text says, written without the library."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    write_raw(path, json.dumps(header).encode(), bytes(data))


def write_raw(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """A file with any header."""
    stated = len(header) if length is None else length
    path.write_bytes(stated.to_bytes(8, "little") + header + data)


def tiny_tensors(config: Mapping[str, Any] = TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)
    hidden, size = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (query, hidden),
            f"{name}.self_attn.k_proj.weight": (kv, hidden),
            f"{name}.self_attn.v_proj.weight": (kv, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, query),
            f"{name}.mlp.gate_proj.weight": (size, hidden),
            f"{name}.mlp.up_proj.weight": (size, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, size),
        }
    return {
        name: torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A directory with a tiny random llama."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    write_safetensors(tmp_path / "model.safetensors", tiny_tensors())
    return tmp_path
