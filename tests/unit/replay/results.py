"""Results of replays that never ran, for what comes after one."""

from __future__ import annotations

from typing import Any

import numpy as np

from services.replay.simulation import SimulationConfig, SimulationResult, WorkerTotals


def result(
    ttft_ms: list[float],
    *,
    policy: str = "kv",
    speed: float = 1.0,
    cached: int = 0,
    arrival_step_ms: float = 100.0,
    **changed: Any,
) -> SimulationResult:
    """Requests of 1,000 prompt tokens and 10 output tokens, on two workers."""
    n = len(ttft_ms)
    ttft = np.array(ttft_ms)
    fields: dict[str, Any] = {
        "config": SimulationConfig(num_workers=2, policy=policy, speed=speed),
        "arrival_ms": np.arange(n) * arrival_step_ms / speed,
        "ttft_ms": ttft,
        "e2e_ms": ttft + 90.0,
        "prompt_tokens": np.full(n, 1000),
        "output_tokens": np.full(n, 10),
        "cached_tokens": np.full(n, cached),
        "matched_tokens": np.full(n, cached),
        "predicted_ttft_ms": ttft * 1.5,
        "worker": np.zeros(n, np.int32),
        "status": np.where(np.isnan(ttft), 1, 0).astype(np.int8),
        "migrations": np.zeros(n, np.int32),
        "gap_ms": np.array([20.0, 10.0]),
        "gap_counts": np.array([1, 9 * n - 1]),
        "workers": (
            WorkerTotals(0, n, 1000 * n, cached * n, 10 * n, 100, 300.0, 2),
            WorkerTotals(1, busy_ms=100.0, preemptions=1),
        ),
        "duration_ms": 10_000.0,
    }
    return SimulationResult(**(fields | changed))
