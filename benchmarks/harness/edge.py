"""What a streamed token, and a request, cost the processes between clients and workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .load import Load, Shape

if TYPE_CHECKING:
    from .processes import Processes

MODEL = "smollm2-135m"
NUM_WORKERS = 2
NUM_CLIENTS = 32
SHAPE = Shape(model=MODEL, prompt_len=2200, num_tokens=128)
#: Tokens per second, over all clients.
RATES = (2000, 7000, 13000)


@dataclass(frozen=True)
class Run:
    """One measurement."""

    #: Tokens per second, and requests.
    rate: float
    num_requests: int
    tokens_per_event: float
    #: Process CPU per token, in µs, by process.
    cost: dict[str, float]
    #: Of the processes between clients and workers together.
    edge: float
    #: The same per request.
    edge_per_request: float

    @property
    def workers(self) -> float:
        """All workers together, their engines included."""
        return sum(cost for name, cost in self.cost.items() if name.startswith("worker"))


def connect(kind: str, target: str, shape: Shape = SHAPE, num_clients: int = NUM_CLIENTS) -> Load:
    """Clients, warmed up when their context begins. `kind`: "http" or "grpc"."""
    return Load(kind, target, shape, num_clients=num_clients)


def rounds(rate: float, seconds: float, shape: Shape = SHAPE) -> int:
    """How many requests per client take about `seconds`."""
    return max(1, math.ceil(seconds * rate / (NUM_CLIENTS * shape.num_tokens)))


def measure_once(processes: Processes, load: Load, num_rounds: int) -> Run:
    """CPU before and after some rounds."""
    before = processes.cpu_s()
    result = load.run(num_rounds)
    after = processes.cpu_s()
    used = {name: 1e6 * (after[name] - before[name]) for name in before}
    edge = sum(used[name] for name in processes.edge)
    return Run(
        rate=result.num_tokens / result.wall_s,
        num_requests=result.num_requests,
        tokens_per_event=result.num_tokens / result.num_events,
        cost={name: value / result.num_tokens for name, value in used.items()},
        edge=edge / result.num_tokens,
        edge_per_request=edge / result.num_requests,
    )
