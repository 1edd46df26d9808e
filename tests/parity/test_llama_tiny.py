"""Our llama against `transformers` on tiny random models, as that library saves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from headrace.models.files import from_path

from .llama_plans import Subject, error, run

if TYPE_CHECKING:
    from pathlib import Path

BASE = {
    "vocab_size": 200, "max_position_embeddings": 128, "num_hidden_layers": 3,
    "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "untied, grouped": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "one kv head": {"num_key_value_heads": 1},
    "a kv head each": {"num_key_value_heads": 6},
    "head_dim apart": {"head_dim": 16},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}


@pytest.mark.parametrize("shards", ["5GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(transformers: Any, tmp_path: Path, variant: str, shards: str) -> None:
    """The largest difference is at most 1e-5 of the largest logit."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(BASE | VARIANTS[variant]))
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    tokens = torch.randint(0, 200, (60,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]

    subject = Subject(from_path(tmp_path, "tiny"))
    runner = subject.runner()
    table = [7, 3, 9, 4]
    found = [
        subject.logits(runner, run(tokens, start, end, table))
        for start, end in ((0, 20), (20, 50), (50, 51), (51, 60))
    ]

    assert error(torch.cat(found), expected) < 1e-5
