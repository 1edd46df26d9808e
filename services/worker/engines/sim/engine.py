"""The `sim` engine: real scheduling and KV blocks, no arithmetic.

It takes the time that it is told a model takes, and its tokens are a pure
function of the tokens before them, so that a resumed or migrated stream can be
checked exactly. It reads a model's config and vocabulary, never its weights.
Temperature, filters and seed change nothing; log probabilities are made up.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from headrace.models.files import from_path
from services.worker import model_config
from services.worker.engine import EngineInfo
from services.worker.engine_core import EngineCore
from services.worker.engines.sim.clock import RealClock
from services.worker.engines.sim.runner import SimRunner
from services.worker.engines.sim.tiers import tiers
from services.worker.engines.sim.timing import Defaults, create
from services.worker.engines.sim.tokens import plain_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.engine import EngineConfig
    from services.worker.engines.sim.clock import Clock

#: Fields of SamplingParams that are taken. What would have to change tokens is not.
SUPPORTED = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop_token_ids",
        "ignore_eos", "stop_token_sequences", "logprobs",
    }
)  # fmt: skip
#: A model in 16 bits: what the KV budget is divided by.
_BYTES_PER_ELEMENT = 2


class SimEngine(EngineCore):
    """See Engine. `clock` None is real time."""

    def __init__(
        self,
        config: EngineConfig,
        report: Callable[[str, float | None], None],
        clock: Clock | None = None,
    ) -> None:
        defaults = _defaults(config)
        clock = clock or RealClock()
        report("reading the model's config", None)
        files = from_path(Path(config.model_path), config.model_name)
        model = model_config.read(files)
        timing = create(config.sim_timing, replace(defaults, model=model))
        token_bytes = model.kv_elements_per_token * _BYTES_PER_ELEMENT
        num_blocks = model_config.num_blocks(config, token_bytes)
        slower = tiers(
            token_bytes * config.block_size,
            host=(config.sim_host_blocks, config.sim_host_gbps),
            disk=(config.sim_disk_blocks, config.sim_disk_gbps),
        )
        info = EngineInfo(
            engine="sim",
            model_revision=files.revision(),
            tokenizer_digest=files.tokenizer_digest(),
            vocab_size=model.vocab_size,
            context_len=model_config.context_len(config, model, num_blocks),
            block_size=config.block_size,
            total_blocks=num_blocks,
            max_sequences=config.max_sequences,
            eos_token_ids=model.eos_token_ids,
            resume="exact",
            tiers=slower.names,
            tier_blocks=slower.blocks,
            tier_ms_per_block=slower.ms_per_block,
            sampling=SUPPORTED,
        )
        self.plain_tokens = plain_tokens(files, model)
        runner = SimRunner(
            timing,
            clock,
            self.plain_tokens,
            num_blocks=num_blocks,
            block_size=config.block_size,
            tier_blocks=slower.blocks,
            tier_ms_per_block=slower.ms_per_block,
        )
        super().__init__(
            info,
            runner,
            clock.now,
            max_step_tokens=config.max_step_tokens,
            max_sequences=config.max_sequences,
        )


def _defaults(config: EngineConfig) -> Defaults:
    for name in ("sim_prefill_ms_per_token", "sim_step_ms", "sim_step_ms_per_sequence"):
        # Not `< 0`: that would let NaN pass.
        if not 0 <= getattr(config, name) < float("inf"):
            raise StartupError(f"{name} must be 0 or more, not {getattr(config, name)}")
    return Defaults(
        step_ms=config.sim_step_ms,
        step_ms_per_sequence=config.sim_step_ms_per_sequence,
        prefill_ms_per_token=config.sim_prefill_ms_per_token,
    )
