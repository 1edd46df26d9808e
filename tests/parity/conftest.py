"""Reference models by `transformers`, loaded once a session."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from headrace.models.files import ModelFiles

#: SmolLM2-135M's shape, written out, so that the reference does not hang on our reading of it.
SMOLLM2 = {
    "vocab_size": 49152, "max_position_embeddings": 8192, "num_hidden_layers": 30,
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The library, imported late and kept from any network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # First: it sets how OpenMP's threads wait.
    import services.worker.engines.torch  # noqa: F401

    with warnings.catch_warnings():
        # What others deprecate in each other's libraries is not ours to fail on.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        import transformers as library

    return library


@pytest.fixture(scope="session")
def reference(transformers: Any, smollm2: ModelFiles) -> Any:
    """SmolLM2 in float32: read, renamed, dequantized and permuted by `transformers` and `gguf`."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2)).eval()
    found = load_gguf_checkpoint(str(smollm2.path), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(found["tensors"], strict=False)
    assert missing == ["lm_head.weight"], "the output projection is the embedding, all else is read"
    assert not unexpected
    model.tie_weights()
    return model
