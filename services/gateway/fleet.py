"""What a gateway knows of models and workers: small types, and the choice without a router.

Plain data. How it arrives is the peers' matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.registry import ModelCard

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker process. `generation` is new at every start of it."""

    worker_id: str
    generation: int
    address: str


@dataclass(frozen=True, slots=True)
class FleetModel:
    """A model and who serves it now."""

    card: ModelCard
    workers: tuple[Worker, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where one request goes. `reservation_id` is to be released when it is over there."""

    worker: Worker
    reservation_id: int
    #: Prompt tokens that the worker is believed to hold in its cache.
    matched_tokens: int = 0
    #: For the engine only.
    hand_off: bytes = b""


def least_loaded(
    workers: Iterable[Worker], load: Mapping[str, int], exclude: Collection[str]
) -> Worker | None:
    """The worker with the smallest `load` by id, excluded ones left out; ties by id."""
    eligible = [worker for worker in workers if worker.worker_id not in exclude]
    return min(
        eligible, key=lambda worker: (load.get(worker.worker_id, 0), worker.worker_id), default=None
    )
