"""What architectures are built of. Each layer is a callable on plain tensors."""

from services.worker.engines.torch.layers.build import Builder, TensorSource
from services.worker.engines.torch.layers.embedding import Embedding
from services.worker.engines.torch.layers.linear import Linear
from services.worker.engines.torch.layers.norm import RMSNorm
from services.worker.engines.torch.layers.rope import Rope

__all__ = ["Builder", "Embedding", "Linear", "RMSNorm", "Rope", "TensorSource"]
