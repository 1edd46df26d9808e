"""Mistral: Llama with attention over a window (https://arxiv.org/abs/2310.06825).

The window is each layer's option in the config; attention applies it. GGUF files of
Mistral say that they are Llama.
"""

from services.worker.engines.torch.models.llama import Llama


class Mistral(Llama):
    """The model."""
