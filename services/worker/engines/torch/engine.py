"""The torch engine: files → weights → model → runner → engine core.

It composes and loads. What happens in a step is the core's and the runner's.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headrace.errors import StartupError
from headrace.models.files import from_path
from services.worker import model_config
from services.worker.engine import EngineInfo
from services.worker.engine_core import EngineCore
from services.worker.engines.torch.attention import KVCache, bytes_per_position, kv_groups
from services.worker.engines.torch.determinism import obstacle, require
from services.worker.engines.torch.device import place, use_threads
from services.worker.engines.torch.layers import Builder
from services.worker.engines.torch.models import model_class
from services.worker.engines.torch.runner import TorchRunner
from services.worker.engines.torch.sampling import SUPPORTED
from services.worker.engines.torch.weights import Weights, open_checkpoint
from services.worker.kv import capacity

if TYPE_CHECKING:
    from collections.abc import Callable

    from headrace.models.files import ModelFiles
    from services.worker.engine import EngineConfig
    from services.worker.engines.torch.device import Placement
    from services.worker.engines.torch.models import Model
    from services.worker.model_config import ModelConfig


class TorchEngine(EngineCore):
    """See services.worker.engine.Engine.

    `resume` is "exact" where logits are the same to the bit however they were
    computed (determinism.py), which `config.deterministic` demands. Elsewhere it is
    "semantic": a resumed sequence is prefilled where it was decoded before, and a
    product over many rows may round otherwise than one over a few, so a near tie
    can fall to another token.
    """

    def __init__(self, config: EngineConfig, report: Callable[[str, float | None], None]) -> None:
        use_threads(config.num_threads)
        placement = place(config.device, config.dtype, deterministic=config.deterministic)
        files = from_path(Path(config.model_path), config.model_name)
        args = model_config.read(files)
        if config.deterministic:
            require(args, placement)
        num_blocks = model_config.num_blocks(config, bytes_per_position(args, placement))
        # Rope may depend on how long a sequence can become.
        served = model_config.context_len(config, args, num_blocks)
        held = capacity(kv_groups(args), num_blocks, config.block_size, config.max_step_tokens)
        args = replace(args, context_len=min(served, held))
        model = load(files, args, placement, report)
        report("allocating KV cache", None)
        cache = _allocate(args, num_blocks, config.block_size, placement)
        info = EngineInfo(
            engine="torch",
            model_revision=files.revision(),
            tokenizer_digest=files.tokenizer_digest(),
            vocab_size=args.vocab_size,
            context_len=args.context_len,
            block_size=config.block_size,
            total_blocks=num_blocks,
            max_sequences=config.max_sequences,
            eos_token_ids=args.eos_token_ids,
            resume="semantic" if obstacle(args, placement) else "exact",
            sampling=SUPPORTED,
        )
        super().__init__(
            info,
            # Experts are chosen by value.
            TorchRunner(
                model, cache, graph_rows=config.max_sequences if args.experts is None else 0
            ),
            time.perf_counter,
            max_step_tokens=config.max_step_tokens,
            max_sequences=config.max_sequences,
            kv_groups=cache.groups,
        )


def load(
    files: ModelFiles,
    args: ModelConfig,
    placement: Placement,
    report: Callable[[str, float | None], None],
) -> Model:
    """The model with its weights on the device. Raises StartupError naming what is wrong."""
    report("loading weights", 0.0)
    chosen = model_class(args.architecture)
    weights = Weights(open_checkpoint(files), chosen.naming(files.format, args), report)
    with torch.inference_mode():
        model = chosen(args, Builder(weights, placement))
    weights.finish()
    return model


def _allocate(args: ModelConfig, num_blocks: int, block_size: int, placement: Placement) -> KVCache:
    try:
        return KVCache(args, num_blocks, block_size, placement, kv_groups(args))
    except (RuntimeError, MemoryError) as error:
        mib = bytes_per_position(args, placement) * num_blocks * block_size >> 20
        raise StartupError(
            f"no room for a KV cache of {mib} MiB on {placement.device}: lower kv_cache_mib"
        ) from error
