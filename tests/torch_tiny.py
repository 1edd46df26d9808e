"""A tiny random model of every architecture, made without a file or any other library."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.layers import Builder
from services.worker.engines.torch.models import model_class
from services.worker.model_config import ExpertConfig, LayerAttention, ModelConfig, RopeConfig

if TYPE_CHECKING:
    from services.worker.engines.torch.device import Placement
    from services.worker.engines.torch.models import Model

NUM_LAYERS = 4
FULL, WINDOW = LayerAttention(), LayerAttention(window=21)
CAPPED = LayerAttention(scale=0.3, soft_cap=2.0)
CAPPED_WINDOW = LayerAttention(window=21, scale=0.3, soft_cap=2.0)
EXPERTS = ExpertConfig(5, 2, 48, normalize=True)


def _config(
    architecture: str,
    attention: tuple[LayerAttention, ...] = (FULL,) * NUM_LAYERS,
    experts: ExpertConfig | None = None,
    rotary_dim: int = 16,
    soft_cap: float | None = None,
) -> ModelConfig:
    return ModelConfig(
        architecture=architecture, vocab_size=512, context_len=4096, num_layers=NUM_LAYERS,
        hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=10_000.0, rotary_dim=rotary_dim),
        tie_embeddings=architecture == "gemma3", eos_token_ids=(2,), bos_token_id=1,
        attention=attention, experts=experts, final_soft_cap=soft_cap,
    )  # fmt: skip


CONFIGS = {
    "llama": _config("llama"),
    "mistral": _config("mistral", (WINDOW,) * NUM_LAYERS),
    "qwen2": _config("qwen2", (FULL, WINDOW, WINDOW, WINDOW)),
    "qwen3": _config("qwen3"),
    "gemma3": _config("gemma3", (CAPPED_WINDOW, CAPPED) * 2, soft_cap=3.0),
    "phi3": _config("phi3", (WINDOW,) * NUM_LAYERS, rotary_dim=12),
    "mixtral": _config("mixtral", experts=EXPERTS),
    "qwen3_moe": _config("qwen3_moe", experts=EXPERTS),
}


class RandomWeights:
    """The same weights under the same name, on every machine and in every type."""

    def take(self, name: str, out: torch.Tensor) -> None:
        """See TensorSource."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        spread = 0.1 if out.ndim == 1 else out.shape[-1] ** -0.5
        out.copy_(torch.randn(out.shape, generator=generator) * spread + (out.ndim == 1))


def tiny_model(config: ModelConfig, placement: Placement) -> Model:
    """The model on that device."""
    with torch.inference_mode():
        return model_class(config.architecture)(config, Builder(RandomWeights(), placement))
