"""What an engine serves of a model: how long a sequence, how many KV blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.errors import StartupError

if TYPE_CHECKING:
    from services.worker.engine import EngineConfig
    from services.worker.model_config.config import ModelConfig


def context_len(config: EngineConfig, model: ModelConfig, num_blocks: int) -> int:
    """The longest sequence that an engine takes: what is asked, and fits model and KV cache.

    Raises StartupError if `config.context_len` asks for more than the model has.
    """
    if not 0 <= config.context_len <= model.context_len:
        raise StartupError(
            f"context_len must be at most the model's {model.context_len}, not {config.context_len}"
        )
    return min(config.context_len or model.context_len, num_blocks * config.block_size)


def num_blocks(config: EngineConfig, bytes_per_token: int) -> int:
    """KV blocks to allocate: `config.num_blocks`, or what `config.kv_cache_mib` holds.

    Raises StartupError for sizes that hold no block.
    """
    if config.block_size < 1:
        raise StartupError(f"block_size must be 1 or more, not {config.block_size}")
    if config.num_blocks < 0:
        raise StartupError(f"num_blocks must be 0 or more, not {config.num_blocks}")
    found = config.num_blocks or (config.kv_cache_mib << 20) // (
        bytes_per_token * config.block_size
    )
    if found < 1:
        raise StartupError(
            f"kv_cache_mib {config.kv_cache_mib} holds no block of {config.block_size} tokens "
            f"({bytes_per_token} bytes each): raise it"
        )
    return found
