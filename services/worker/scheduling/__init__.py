"""Which sequences the next step computes. No tensors, no clock but the one handed in."""

from services.worker.scheduling.scheduler import (
    CachedPrefix,
    Chunk,
    Decision,
    Groups,
    Schedulable,
    Snapshot,
    blocks_for,
    schedule,
)
from services.worker.scheduling.waiting import (
    DECODE_COST,
    PREFILL_COST,
    TenantCounters,
    WaitingQueue,
)

__all__ = [
    "DECODE_COST",
    "PREFILL_COST",
    "CachedPrefix",
    "Chunk",
    "Decision",
    "Groups",
    "Schedulable",
    "Snapshot",
    "TenantCounters",
    "WaitingQueue",
    "blocks_for",
    "schedule",
]
