"""Which worker a key belongs to, without any table: rendezvous hashing, bounded by load.

Each worker has a weight for each key, and the largest wins (Thaler and Ravishankar,
"Using Name-Based Mappings to Increase Hit Rates", 1998). A worker that joins or leaves
moves only the keys that it wins or won. A worker that has more than `FACTOR` times its
share of the sequences passes the request to the next (Mirrokni, Thorup and
Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2018), so no key makes one
worker hot for long.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.router.policies.base import Candidate

FACTOR = 1.25


def owner(key: bytes, pool: Sequence[Candidate]) -> Candidate:
    """The worker of `pool`, which is not empty, that `key` goes to."""
    total = sum(candidate.load.sequences for candidate in pool) + 1
    # Never below 1: somebody is always within it.
    most = FACTOR * total / len(pool)
    free = [c for c in pool if c.load.sequences + 1 <= max(1.0, most)]
    return max(free or pool, key=lambda candidate: _weight(key, candidate.worker_id))


def _weight(key: bytes, worker_id: str) -> bytes:
    return blake2b(worker_id.encode(), digest_size=8, key=key).digest()
