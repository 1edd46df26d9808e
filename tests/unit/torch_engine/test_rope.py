"""Rope's frequencies against `transformers`', as it reads the same config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker import model_config
from services.worker.engines.torch.device import Placement
from services.worker.engines.torch.layers import Rope
from services.worker.engines.torch.layers.rope_frequencies import FREQUENCIES, frequencies
from services.worker.model_config import RopeConfig

FLOAT = Placement(torch.device("cpu"), torch.float32, torch.float32)
BASE = {
    "model_type": "llama", "vocab_size": 50, "max_position_embeddings": 4096,
    "num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 64,
    "num_attention_heads": 2, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 50 for i in range(64)],
        "long_factor": [1.0 + i / 3 for i in range(64)]}  # fmt: skip
#: Config and the longest sequence served.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, 4096),
    "linear, in the older spelling": ({"type": "linear", "factor": 4}, 4096),
    "dynamic, short": ({"rope_type": "dynamic", "factor": 4.0}, 4096),
    "dynamic, long": ({"rope_type": "dynamic", "factor": 4.0}, 9000),
    "llama3": (LLAMA3, 4096),
    "llama3, no original length": (
        {k: v for k, v in LLAMA3.items() if not k.startswith("orig")}, 4096),
    "yarn": (YARN, 4096),
    "yarn, betas": ({**YARN, "beta_fast": 16, "beta_slow": 2}, 4096),
    "yarn, attention factor": ({**YARN, "attention_factor": 0.9}, 4096),
    "yarn, mscale": ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}, 4096),
    "yarn, one mscale": ({**YARN, "mscale": 0.7}, 4096),
    "yarn, no truncation": ({**YARN, "truncate": False}, 4096),
    "yarn, ratio for a factor": (
        {**YARN, "factor": None, "original_max_position_embeddings": 1024}, 4096),
    "longrope, short": ({**LONG, "original_max_position_embeddings": 1024}, 1000),
    "longrope, long": ({**LONG, "original_max_position_embeddings": 1024}, 4096),
    "longrope, factor": (
        {**LONG, "original_max_position_embeddings": 1024, "factor": 16.0}, 4096),
    "longrope, attention factor": (
        {**LONG, "original_max_position_embeddings": 1024, "attention_factor": 1.2}, 4096),
}  # fmt: skip


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_frequencies(
    transformers: Any, tmp_path: Path, case: tuple[dict[str, Any], int], theta: float, key: str
) -> None:
    scaling, length = case
    values = BASE | {"rope_theta": theta, key: scaling}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    expected, expected_factor = init(config, torch.device("cpu"), seq_len=length)

    rope = model_config.from_huggingface(tmp_path).rope
    found, factor = frequencies(rope, length)

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-9)


def test_every_kind_has_a_case() -> None:
    tried = {case[0].get("rope_type", "linear") for case in CASES.values()}
    assert tried | {"default", "factors"} == set(FREQUENCIES)


def test_what_gguf_makes_of_llama3() -> None:
    """llama.cpp writes the divisors that turn plain frequencies into llama3's."""
    scaled = RopeConfig(5e5, 128, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, _ = frequencies(RopeConfig(5e5, 128), 1)
    expected, _ = frequencies(scaled, 1)
    divisors = tuple((plain / expected).tolist())
    found, factor = frequencies(RopeConfig(5e5, 128, "factors", long_factors=divisors), 1)
    torch.testing.assert_close(found, expected)
    assert factor == 1.0


def test_rotates_pairs_by_position() -> None:
    positions = torch.tensor([0, 3, 40])
    x = torch.randn(3, 2, 8)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    Rope(RopeConfig(10000.0, 8), 64, FLOAT).at(positions)(x)
    torch.testing.assert_close(x, expected)


def test_rotates_part_of_a_head_by_the_factor() -> None:
    """Elements after the rotated ones stay; at position 0 the factor alone is seen."""
    rope = RopeConfig(10000.0, 4, "yarn", 4.0, 64, attention_factor=1.5)
    x = torch.randn(1, 2, 8)
    expected = x.clone()
    expected[..., :4] *= 1.5
    Rope(rope, 64, FLOAT).at(torch.tensor([0]))(x)
    torch.testing.assert_close(x, expected)
