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
from services.worker.kv.tiered_manager import TieredBlockManager

__all__ = [
    "BlockManager",
    "KVGroup",
    "TieredBlockManager",
    "block_layers",
    "capacity",
    "group_layers",
    "most_blocks",
    "reach",
]
