"""KV blocks and the prefix cache, as numbers. No tensors."""

from services.worker.kv.block_manager import BlockManager
from services.worker.kv.layout import (
    KVGroup,
    block_layers,
    capacity,
    group_layers,
    most_blocks,
    reach,
)

__all__ = [
    "BlockManager",
    "KVGroup",
    "block_layers",
    "capacity",
    "group_layers",
    "most_blocks",
    "reach",
]
