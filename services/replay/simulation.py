"""A trace through a simulated fleet: what is asked, and what came of it.

    result = simulate(trace, SimulationConfig(num_workers=8, num_blocks=16384, block_size=64))

It composes the real router (index, policy, reservations) and real engine cores
over a timing model, in virtual time (see `simulation_loop`). It reads no file,
prints nothing, and knows no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from headrace.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.replay.workload import Trace

#: Statuses of a request in `SimulationResult.status`.
COMPLETED, FAILED, REFUSED = 0, 1, 2
STATUS_NAMES = ("completed", "failed", "refused")


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """Something happens to a worker.

    `fail`: it is gone at once, its requests migrate. `leave`: it takes no new
    requests, finishes those it has, and is gone. `join`: a worker of that number
    starts, empty; a new one if the number is beyond those there were.
    """

    at_ms: float
    kind: Literal["fail", "leave", "join"]
    worker: int


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """The fleet, its routers, and the delays between them."""

    num_workers: int = 8
    #: KV blocks of a worker, on its device.
    num_blocks: int = 16384
    #: Tokens of a KV block.
    block_size: int = 64
    #: Blocks that evicted ones fall into: host memory, then disk, and in GB/s how fast
    #: they come back.
    host_blocks: int = 0
    host_gbps: float = 50.0
    disk_blocks: int = 0
    disk_gbps: float = 6.0
    #: KV of one token: Llama 3.1 8B in 16 bits.
    kv_bytes_per_token: int = 131_072
    policy: str = "kv"
    num_routers: int = 1
    #: Whether requests wait at the router while all workers are saturated, and how many may.
    router_queue: bool = True
    max_waiting_requests: int = 1_000_000
    #: A timing model: NAME or NAME:KEY=VALUE,… (services.worker.engines.sim.timing).
    timing: str = "polynomial"
    #: Sequences that a worker runs at once, and tokens that a step computes, at most.
    max_sequences: int = 256
    max_step_tokens: int = 8192
    #: Arrival times are divided by it.
    speed: float = 1.0
    seed: int = 0
    events: tuple[FleetEvent, ...] = ()
    #: From a step's end until routers know of its KV events.
    kv_event_delay_ms: float = 2.0
    #: How often a worker reports its load while it works, and how late that arrives.
    load_report_interval_ms: float = 50.0
    load_report_delay_ms: float = 1.0
    #: How late a router knows what another one has reserved.
    router_exchange_ms: float = 5.0
    #: From the choice to the worker, and from a worker back to the router.
    hop_ms: float = 0.5
    #: From a worker's failure until gateways and routers know.
    failure_detection_ms: float = 1000.0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_workers", 1), ("num_blocks", 1), ("block_size", 1), ("num_routers", 1),
            ("max_sequences", 1), ("max_step_tokens", self.max_sequences),
            ("host_blocks", 0), ("disk_blocks", 0), ("kv_bytes_per_token", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise InvalidArgument(
                    f"{name} must be {least} or more, not {getattr(self, name)}", field=name
                )
        for name in (
            "kv_event_delay_ms", "load_report_delay_ms", "router_exchange_ms", "hop_ms",
            "failure_detection_ms",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidArgument(
                    f"{name} must be 0 or more, not {getattr(self, name)}", field=name
                )
        for name in ("speed", "load_report_interval_ms", "host_gbps", "disk_gbps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidArgument(
                    f"{name} must be more than 0, not {getattr(self, name)}", field=name
                )


@dataclass(frozen=True, slots=True)
class WorkerTotals:
    """What one worker did. Times in ms."""

    worker: int
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    busy_ms: float = 0.0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What came of a replay. Arrays are by request, in the trace's order; times in ms.

    Of a request that got no token, `ttft_ms` is NaN; of one that did not complete,
    `e2e_ms` is NaN. Arrivals are those after `speed`.
    """

    config: SimulationConfig
    arrival_ms: NDArray[np.float64]
    ttft_ms: NDArray[np.float64]
    e2e_ms: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    #: Generated and delivered.
    output_tokens: NDArray[np.int64]
    #: Prompt tokens that the engine found in its cache when it first started the request.
    cached_tokens: NDArray[np.int64]
    #: What the router expected when it chose.
    matched_tokens: NDArray[np.int64]
    predicted_ttft_ms: NDArray[np.float64]
    #: The worker that finished it; -1: none.
    worker: NDArray[np.int32]
    #: COMPLETED, FAILED or REFUSED.
    status: NDArray[np.int8]
    migrations: NDArray[np.int32]
    #: Inter-token latency: gaps, and how many times each occurred; unsorted.
    gap_ms: NDArray[np.float64]
    gap_counts: NDArray[np.int64]
    workers: tuple[WorkerTotals, ...]
    #: From the first arrival to the last token.
    duration_ms: float
    kv_events: int = 0
    decisions: int = 0
    steps: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def reuse_ratio(self) -> float:
        """Cached prompt tokens / all prompt tokens, of requests that started."""
        started = ~np.isnan(self.ttft_ms)
        total = int(self.prompt_tokens[started].sum())
        return float(self.cached_tokens[started].sum()) / total if total else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens per second of virtual time."""
        total = int(self.output_tokens.sum())
        return total / self.duration_ms * 1000 if self.duration_ms else 0.0

    @property
    def requests_per_s(self) -> float:
        """Completed requests per second of virtual time."""
        total = int((self.status == COMPLETED).sum())
        return total / self.duration_ms * 1000 if self.duration_ms else 0.0


def simulate(
    trace: Trace,
    config: SimulationConfig,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationResult:
    """Run `trace` to its end. `progress(ended, all)` is called now and then.

    Raises InvalidArgument for what can't be simulated.
    """
    from services.replay.simulation_loop import Simulation

    return Simulation(trace, config, progress).run()
