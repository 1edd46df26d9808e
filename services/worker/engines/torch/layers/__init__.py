"""What architectures are built of. Each layer is a callable on plain tensors."""

from services.worker.engines.torch.layers.build import Builder, TensorSource
from services.worker.engines.torch.layers.embedding import Embedding
from services.worker.engines.torch.layers.feed_forward import Experts, GatedMLP
from services.worker.engines.torch.layers.linear import Linear
from services.worker.engines.torch.layers.norm import HeadNorm, RMSNorm
from services.worker.engines.torch.layers.rope import Rope, Rotation

__all__ = [
    "Builder",
    "Embedding",
    "Experts",
    "GatedMLP",
    "HeadNorm",
    "Linear",
    "RMSNorm",
    "Rope",
    "Rotation",
    "TensorSource",
]
