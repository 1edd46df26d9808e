"""What a model asks for against what a checkpoint has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from headrace.errors import StartupError
from headrace.models.files import from_path
from services.worker import model_config
from services.worker.engines.torch.device import place
from services.worker.engines.torch.engine import load

from .conftest import TINY, tiny_tensors, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _load(
    path: Path, report: Callable[[str, float | None], None] = lambda *_: None, **config: Any
) -> None:
    (path / "config.json").write_text(json.dumps(TINY | config))
    files = from_path(path, "tiny")
    load(files, model_config.read(files), place("cpu", "float32"), report)


def test_progress_reaches_the_end(tiny: Path) -> None:
    seen: list[tuple[str, float | None]] = []
    _load(tiny, lambda phase, fraction: seen.append((phase, fraction)))
    fractions = [fraction for phase, fraction in seen if phase == "loading weights"]
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0
    assert fractions == sorted(fractions)


def test_a_missing_tensor_is_named(tiny: Path) -> None:
    with pytest.raises(StartupError, match=r"tensor model\.layers\.2\.\S+ is missing"):
        _load(tiny, num_hidden_layers=3)


def test_an_extra_tensor_is_named(tiny: Path) -> None:
    with pytest.raises(StartupError, match=r"no place for tensor model\.layers\.1\.\S+, .* more"):
        _load(tiny, num_hidden_layers=1)


def test_a_bias_is_not_ignored(tiny: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}
    write_safetensors(tiny / "model.safetensors", tiny_tensors() | bias)
    with pytest.raises(StartupError, match=r"no place for tensor \S+q_proj\.bias"):
        _load(tiny)


def test_a_bias_that_an_architecture_has_is_missed(tiny: Path) -> None:
    with pytest.raises(StartupError, match=r"layers\.0\.self_attn\.q_proj\.bias is missing"):
        _load(tiny, model_type="qwen2")


def test_a_bias_of_another_shape_is_named(tiny: Path) -> None:
    bias = {f"model.layers.0.self_attn.{part}_proj.bias": torch.zeros(48) for part in "qkv"}
    write_safetensors(tiny / "model.safetensors", tiny_tensors() | bias)
    with pytest.raises(StartupError, match=r"k_proj\.bias has shape \[48\].*asks for \[16\]"):
        _load(tiny, model_type="qwen2")


def test_experts_that_the_config_does_not_count_are_named(tiny: Path) -> None:
    tensors = {name: tensor for name, tensor in tiny_tensors().items() if ".mlp." not in name}
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{name}.gate.weight"] = torch.zeros(3, 48)
        for expert in range(3):
            for part, shape in (("w1", (80, 48)), ("w2", (48, 80)), ("w3", (80, 48))):
                tensors[f"{name}.experts.{expert}.{part}.weight"] = torch.zeros(shape)
    write_safetensors(tiny / "model.safetensors", tensors)
    config = {"model_type": "mixtral", "num_experts_per_tok": 1}
    _load(tiny, **config, num_local_experts=3)
    with pytest.raises(StartupError, match=r"moe\.gate\.weight has shape \[3, 48\].*\[2, 48\]"):
        _load(tiny, **config, num_local_experts=2)
    for layer in range(2):
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = torch.zeros(4, 48)
    write_safetensors(tiny / "model.safetensors", tensors)
    with pytest.raises(StartupError, match=r"mlp\.experts\.3\.gate_proj is missing"):
        _load(tiny, **config, num_local_experts=4)
    for layer in range(2):
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = torch.zeros(2, 48)
    write_safetensors(tiny / "model.safetensors", tensors)
    with pytest.raises(StartupError, match=r"no place for tensor \S+experts\.2\.w1\.weight"):
        _load(tiny, **config, num_local_experts=2)


def test_a_shape_against_the_config_is_named(tiny: Path) -> None:
    with pytest.raises(StartupError, match=r"gate_proj\.weight has shape \[80, 48\].*\[96, 48\]"):
        _load(tiny, intermediate_size=96)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_named(tiny: Path, value: float) -> None:
    tensors = tiny_tensors()
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    write_safetensors(tiny / "model.safetensors", tensors)
    with pytest.raises(StartupError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or inf"):
        _load(tiny)


def test_a_tied_output_in_the_file_is_allowed(tiny: Path) -> None:
    _load(tiny, tie_word_embeddings=True)
