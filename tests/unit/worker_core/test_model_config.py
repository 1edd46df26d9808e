"""Reading a model's shape, and refusing what contradicts itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from headrace.errors import StartupError
from headrace.models.files import ModelFiles
from services.worker import model_config
from services.worker.engine import EngineConfig

if TYPE_CHECKING:
    from pathlib import Path

LLAMA = {
    "model_type": "llama", "vocab_size": 320, "max_position_embeddings": 128,
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0, "tie_word_embeddings": True, "eos_token_id": 7, "bos_token_id": 1,
}  # fmt: skip


def huggingface(path: Path, **changes: Any) -> model_config.ModelConfig:
    """The config of LLAMA with `changes`; None removes a key."""
    values = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(values))
    return model_config.read(ModelFiles("m", "huggingface", path))


def test_the_default_model(smollm2: ModelFiles) -> None:
    config = model_config.read(smollm2)
    assert (config.architecture, config.vocab_size, config.context_len) == ("llama", 49152, 8192)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope_theta, config.rms_norm_eps) == pytest.approx((1e5, 1e-5))
    assert (config.tie_embeddings, config.eos_token_ids, config.bos_token_id) == (True, (2,), 1)
    assert config.kv_elements_per_token == 2 * 30 * 3 * 64


def test_a_huggingface_directory(tmp_path: Path) -> None:
    config = huggingface(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.rope_theta, config.tie_embeddings) == (50000.0, True)
    assert (config.eos_token_ids, config.bos_token_id) == ((7,), 1)
    bare = huggingface(
        tmp_path, num_key_value_heads=None, tie_word_embeddings=None, rope_theta=None,
        eos_token_id=None, bos_token_id=None, head_dim=32,
    )  # fmt: skip
    assert (bare.num_kv_heads, bare.head_dim, bare.tie_embeddings) == (4, 32, False)
    assert (bare.rope_theta, bare.eos_token_ids, bare.bos_token_id) == (10_000.0, (), None)


def test_generation_config_adds_ends(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert huggingface(tmp_path).eos_token_ids == (9, 7)


def test_rope_parameters_of_newer_files(tmp_path: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 12345}
    assert huggingface(tmp_path, rope_theta=None, rope_parameters=parameters).rope_theta == 12345


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is unknown; there are llama"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": "big"}, "hidden_size must be int, not 'big'"),
        ({"vocab_size": True}, "vocab_size must be int, not True"),
        ({"num_attention_heads": 0}, "num_heads must be positive, not 0"),
        ({"num_key_value_heads": 3}, "4 heads can't share 3 key and value heads"),
        ({"head_dim": 15}, "even head_dim, not 15"),
        ({"eos_token_id": 320}, "end token 320 is not in the vocabulary of 320"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' is not supported"),
        ({"rope_scaling": 2.0}, "rope_scaling must be dict, not 2.0"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_what_it_cannot_mean_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(StartupError, match=r"config\.json: ") as caught:
        huggingface(tmp_path, **changes)
    assert text in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_what_is_no_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(StartupError, match=r"model config .*config\.json"):
        model_config.read(ModelFiles("m", "huggingface", tmp_path))


def test_the_cache_is_as_large_as_asked() -> None:
    config = EngineConfig("", "", kv_cache_mib=1)
    assert model_config.num_blocks(config, bytes_per_token=1024) == 64
    assert model_config.num_blocks(EngineConfig("", "", num_blocks=5), 1024) == 5
    for bad, text in (
        (EngineConfig("", "", kv_cache_mib=0), "kv_cache_mib 0 holds no block of 16 tokens"),
        (EngineConfig("", "", num_blocks=-1), "num_blocks must be 0 or more, not -1"),
        (EngineConfig("", "", block_size=0), "block_size must be 1 or more, not 0"),
    ):
        with pytest.raises(StartupError, match=text):
            model_config.num_blocks(bad, 1024)


def test_the_context_fits_model_and_cache(tmp_path: Path) -> None:
    model = huggingface(tmp_path)
    assert model_config.context_len(EngineConfig("", ""), model, 100) == 128
    assert model_config.context_len(EngineConfig("", "", context_len=50), model, 100) == 50
    assert model_config.context_len(EngineConfig("", ""), model, 3) == 48
    for asked in (129, -1):
        with pytest.raises(StartupError, match=f"at most the model's 128, not {asked}"):
            model_config.context_len(EngineConfig("", "", context_len=asked), model, 100)
