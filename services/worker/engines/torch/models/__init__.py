"""The architectures, by the name that model_config gives them; each loaded only when chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from headrace.errors import StartupError

if TYPE_CHECKING:
    import torch

    from headrace.models.files import Format
    from services.worker.engines.torch.attention import Attend
    from services.worker.engines.torch.layers import Builder
    from services.worker.engines.torch.weights import Naming
    from services.worker.model_config import ModelConfig

MODELS = {
    "llama": "services.worker.engines.torch.models.llama:Llama",
    "mistral": "services.worker.engines.torch.models.mistral:Mistral",
    "qwen2": "services.worker.engines.torch.models.qwen2:Qwen2",
    "qwen3": "services.worker.engines.torch.models.qwen3:Qwen3",
    "gemma3": "services.worker.engines.torch.models.gemma3:Gemma3",
    "phi3": "services.worker.engines.torch.models.phi3:Phi3",
    "mixtral": "services.worker.engines.torch.models.mixtral:Mixtral",
    "qwen3_moe": "services.worker.engines.torch.models.qwen3_moe:Qwen3Moe",
}


class Model(Protocol):
    """A decoder. Built with `ModelClass(args, build)`, which takes every weight it needs."""

    def __init__(self, args: ModelConfig, build: Builder) -> None: ...

    @staticmethod
    def naming(file_format: Format, args: ModelConfig) -> Naming:
        """How a file of this format names and arranges the weights."""

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Shapes: [tokens], [tokens] -> [tokens, hidden]."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Shapes: [rows, hidden] -> [rows, vocab]."""


def model_class(architecture: str) -> type[Model]:
    """The class for an architecture. Raises StartupError if there is none."""
    if architecture not in MODELS:
        raise StartupError(
            f"the torch engine has no architecture {architecture!r}; it has {', '.join(MODELS)}"
        )
    module, _, attribute = MODELS[architecture].partition(":")
    found: type[Model] = getattr(import_module(module), attribute)
    return found
