"""A model's shape, from GGUF keys or a Hugging Face config.json.

It reads numbers and refuses what they contradict; it opens no weight, and knows
which architectures exist, not how they compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.models.gguf_file import GgufFile
from services.worker.model_config.config import (
    ExpertConfig,
    LayerAttention,
    ModelConfig,
    RopeConfig,
)
from services.worker.model_config.gguf import from_gguf
from services.worker.model_config.huggingface import ARCHITECTURES, from_huggingface
from services.worker.model_config.sizes import context_len, num_blocks

if TYPE_CHECKING:
    from headrace.models.files import ModelFiles


def read(files: ModelFiles) -> ModelConfig:
    """The shape of the model in `files`.

    Raises StartupError naming the file and the missing, contradicting or
    unsupported key.
    """
    if files.format == "gguf":
        return from_gguf(GgufFile(files.path))
    return from_huggingface(files.path)


__all__ = [
    "ARCHITECTURES",
    "ExpertConfig",
    "LayerAttention",
    "ModelConfig",
    "RopeConfig",
    "context_len",
    "from_gguf",
    "from_huggingface",
    "num_blocks",
    "read",
]
