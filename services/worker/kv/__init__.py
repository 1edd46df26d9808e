"""KV blocks and the prefix cache, as numbers. No tensors."""

from services.worker.kv.block_manager import BlockManager

__all__ = ["BlockManager"]
