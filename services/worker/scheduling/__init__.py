"""Which sequences the next step computes. No tensors, no clock but the one handed in."""

from services.worker.scheduling.scheduler import (
    CachedPrefix,
    Chunk,
    Decision,
    Schedulable,
    Snapshot,
    blocks_for,
    schedule,
)

__all__ = [
    "CachedPrefix",
    "Chunk",
    "Decision",
    "Schedulable",
    "Snapshot",
    "blocks_for",
    "schedule",
]
