"""Whether a trace and fleets go together, before anything runs.

Pure; it knows no file. What can't work is refused, what only may surprise is a warning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.errors import StartupError
from services.worker.engines.sim.timing import create

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from services.replay.simulation import SimulationConfig
    from services.replay.workload import Trace

#: Policies that choose by what prompts share: without hash ids they still work.
_BY_PREFIX = ("kv", "prefix_hash")


def check(trace: Trace, configs: Sequence[SimulationConfig]) -> list[str]:
    """Warnings. Raises StartupError for what can't be replayed."""
    for config in configs:
        create(config.timing)
        _check_sessions(trace, config)
    warnings = list(_sizes(trace, configs[0]))
    by_prefix = [config.policy for config in configs if config.policy in _BY_PREFIX]
    if by_prefix and not any(request.hash_ids for request in trace.requests):
        warnings.append(
            f"the trace does not say what prompts share, so {by_prefix[0]} can reuse nothing"
        )
    return warnings


def _check_sessions(trace: Trace, config: SimulationConfig) -> None:
    if config.policy == "session" and not any(r.session_id for r in trace.requests):
        raise StartupError(
            "policy session needs session ids, and no request of the trace has one; "
            "Mooncake lines may have a session_id, and sessions and synthetic traces do"
        )


def _sizes(trace: Trace, config: SimulationConfig) -> Iterator[str]:
    """`config`: all have the same blocks."""
    capacity = config.num_blocks * config.block_size
    longest = max(request.num_tokens + request.output_tokens for request in trace.requests)
    too_long = sum(r.num_tokens + r.output_tokens > capacity for r in trace.requests)
    if too_long == len(trace.requests):
        raise StartupError(
            f"no request fits a worker of {config.num_blocks:,} blocks of {config.block_size} "
            f"tokens ({capacity:,} tokens); the longest has {longest:,}: raise --blocks"
        )
    if too_long:
        yield (
            f"{too_long:,} of {len(trace.requests):,} requests are longer than a worker's "
            f"{capacity:,} tokens of KV cache (the longest has {longest:,}) and will fail"
        )
