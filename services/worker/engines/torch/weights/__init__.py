"""Weights from files: GGUF and safetensors, checked and handed out by name."""

from services.worker.engines.torch.weights.checkpoint import (
    Checkpoint,
    Naming,
    Weights,
    open_checkpoint,
)

__all__ = ["Checkpoint", "Naming", "Weights", "open_checkpoint"]
