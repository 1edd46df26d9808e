"""Several replays at once give what they give one by one, and fail as one would."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

from headrace.errors import HeadraceError, StartupError
from services.replay.runs import run_all
from services.replay.simulation import SimulationConfig
from services.replay.traces import TraceOptions, load
from services.replay.workload import Trace

CONFIGS = [
    SimulationConfig(num_workers=2, policy=policy, speed=speed)
    for policy in ("kv", "round_robin")
    for speed in (1.0, 3.0)
]


@pytest.fixture(scope="module")
def trace() -> Trace:
    description = "synthetic:requests=40,rate=20,prefixes=3,prefix=500,prompt=300,output=10"
    return load(description, TraceOptions())


def test_processes_change_nothing(trace: Trace) -> None:
    said: dict[int, list[tuple[int, int]]] = {}

    def progress(run: int, ended: int, of: int) -> None:
        said.setdefault(run, []).append((ended, of))

    alone = run_all(trace, CONFIGS, 1, lambda *_: None)
    together = run_all(trace, CONFIGS, 2, progress)
    for one, other in zip(alone, together, strict=True):
        assert one.config == other.config
        assert one.workers == other.workers
        for name in ("ttft_ms", "e2e_ms", "cached_tokens", "worker", "gap_ms", "gap_counts"):
            assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True), name
    assert {run: steps[-1] for run, steps in said.items()} == dict.fromkeys(range(4), (40, 40))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_one_refuses_all_refuse(trace: Trace, jobs: int) -> None:
    bad = SimulationConfig(timing="abacus")
    with pytest.raises((HeadraceError, StartupError), match="abacus"):
        run_all(trace, [*CONFIGS, bad], jobs, lambda *_: None)
    assert not multiprocessing.active_children()
