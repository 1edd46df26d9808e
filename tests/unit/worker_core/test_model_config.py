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
    assert (config.rope.theta, config.rms_norm_eps) == pytest.approx((1e5, 1e-5))
    assert (config.tie_embeddings, config.eos_token_ids, config.bos_token_id) == (True, (2,), 1)
    assert config.kv_elements_per_token == 2 * 30 * 3 * 64


def test_a_huggingface_directory(tmp_path: Path) -> None:
    config = huggingface(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.rope.theta, config.tie_embeddings) == (50000.0, True)
    assert (config.eos_token_ids, config.bos_token_id) == ((7,), 1)
    bare = huggingface(
        tmp_path, num_key_value_heads=None, tie_word_embeddings=None, rope_theta=None,
        eos_token_id=None, bos_token_id=None, head_dim=32,
    )  # fmt: skip
    assert (bare.num_kv_heads, bare.head_dim, bare.tie_embeddings) == (4, 32, False)
    assert (bare.rope.theta, bare.eos_token_ids, bare.bos_token_id) == (10_000.0, (), None)


def test_generation_config_adds_ends(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert huggingface(tmp_path).eos_token_ids == (9, 7)


def test_rope_parameters_of_newer_files(tmp_path: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 12345}
    assert huggingface(tmp_path, rope_theta=None, rope_parameters=parameters).rope.theta == 12345


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is unknown; there are llama, mistral,"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": "big"}, "hidden_size must be int, not 'big'"),
        ({"vocab_size": True}, "vocab_size must be int, not True"),
        ({"num_attention_heads": 0}, "num_heads must be positive, not 0"),
        ({"num_key_value_heads": 3}, "4 heads can't share 3 key and value heads"),
        ({"head_dim": 15}, "even number of dimensions, at most head_dim 15, not 15"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be positive, not 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be positive"),
        ({"eos_token_id": 320}, "end token 320 is not in the vocabulary of 320"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.rope_type: rope type 'mrope' is not"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be positive, not 0"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "long_factor is missing"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "rope has 1 short_factors for 8 frequencies",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": ["a"], "long_factor": [2.0]}},
            "short_factor must be positive numbers",
        ),
        ({"rope_theta": float("nan")}, "rope_theta must be positive, not nan"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported for llama"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "checkpoints quantized by 'gptq' are not supported",
        ),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype: the type 'float8_e4m3fn' is not"),
        ({"dtype": "int8"}, "dtype: the type 'int8' is not supported; there are float32"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"], "use_sliding_window": True},
         "layer_types has 1 entries for 2 layers"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "chunked"],
          "use_sliding_window": True}, "the layer 'chunked' is not supported"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be positive, not 0"),
        ({"model_type": "gemma3_text", "hidden_activation": "silu"},
         "hidden_activation 'silu' is not supported for gemma3 (gelu_pytorch_tanh is)"),
        ({"model_type": "gemma3"}, "text_config is missing"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "each token uses 9 of 8 experts"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step must be"),
        ({"rope_scaling": 2.0}, "rope_scaling must be dict, not 2.0"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)  # fmt: skip
def test_what_it_cannot_mean_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(StartupError, match=r"config\.json: ") as caught:
        huggingface(tmp_path, **changes)
    assert text in str(caught.value)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_of_weights_may_be_stated(tmp_path: Path, key: str) -> None:
    for name in ("float32", "bfloat16", "float16", "torch.bfloat16"):
        assert huggingface(tmp_path, **{key: name}).architecture == "llama"


def windows(config: model_config.ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.attention]


def test_windows(tmp_path: Path) -> None:
    """Which layers have one: all, the later ones, those listed, or all but each n-th."""
    assert windows(huggingface(tmp_path)) == [None, None]
    mistral = {"model_type": "mistral", "sliding_window": 5}
    assert windows(huggingface(tmp_path, **mistral)) == [5, 5]
    # Absent means transformers' default, null means none.
    assert windows(huggingface(tmp_path, model_type="mistral")) == [4096, 4096]
    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    (tmp_path / "config.json").write_text(json.dumps(values | mistral | {"sliding_window": None}))
    assert windows(model_config.from_huggingface(tmp_path)) == [None, None]
    qwen = {"model_type": "qwen2", "sliding_window": 5, "max_window_layers": 1}
    assert windows(huggingface(tmp_path, **qwen)) == [None, None]
    assert windows(huggingface(tmp_path, **qwen, use_sliding_window=True)) == [None, 5]
    kinds = ["sliding_attention", "full_attention"]
    listed = huggingface(tmp_path, **qwen, use_sliding_window=True, layer_types=kinds)
    assert windows(listed) == [5, None]
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 5}
    assert windows(huggingface(tmp_path, **gemma)) == [5] * 5 + [None, 5]
    assert windows(huggingface(tmp_path, **gemma, sliding_window_pattern=2))[:3] == [5, None, 5]


def test_gemma_with_images(tmp_path: Path) -> None:
    """Its text model's keys, and the whole model's ends."""
    text = {**LLAMA, "model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8},
            "rope_theta": 1e6, "rope_local_base_freq": 9e3, "eos_token_id": 7}  # fmt: skip
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "eos_token_id": [9, 7]})
    )
    config = model_config.from_huggingface(tmp_path)
    assert config.eos_token_ids == (9, 7)
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == ("linear", 8.0, 1e6)
    assert config.local_rope == model_config.RopeConfig(9e3, 256)
    assert config.attention[0].scale == 256**-0.5


def test_the_context_that_rope_stretches(tmp_path: Path) -> None:
    def stretched(**scaling: Any) -> int:
        return huggingface(tmp_path, rope_scaling=scaling).context_len

    assert stretched(type="linear", factor=4) == 128
    assert stretched(type="dynamic", factor=4) == 512
    assert stretched(type="yarn", factor=4, original_max_position_embeddings=128) == 512
    assert stretched(type="yarn", factor=4, original_max_position_embeddings=32) == 128


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
