"""Reference models by `transformers`, loaded once a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from headrace.models.files import ModelFiles

#: SmolLM2-135M's shape, written out, so that the reference does not hang on our reading of it.
SMOLLM2 = {
    "vocab_size": 49152, "max_position_embeddings": 8192, "num_hidden_layers": 30,
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def fill(model: Any, path: Path) -> None:
    """Give a model of `transformers` a GGUF's weights: that library and `gguf` read, rename,
    dequantize and permute them.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(found["tensors"], strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"]), "a tied output projection alone is not read"
    model.tie_weights()


@pytest.fixture(scope="session")
def reference(transformers: Any, smollm2: ModelFiles) -> Any:
    """SmolLM2 in float32."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2)).eval()
    fill(model, smollm2.path)
    return model
