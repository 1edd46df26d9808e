"""How long Redis has been there without a break, and a position in its streams.

A missing lease is proof only when its worker could have renewed it for a whole
TTL. So time counts from the moment at which Redis answered again after a failure,
was found to be another process (its run_id), or to have lost its data.

Pure: the clock is handed in.
"""

from __future__ import annotations

from typing import NamedTuple


class StreamId(NamedTuple):
    """An entry's id; later ones are greater."""

    ms: int
    number: int

    @classmethod
    def parse(cls, data: bytes) -> StreamId:
        """From `123-4`, as Redis writes it."""
        ms, _, number = data.partition(b"-")
        return cls(int(ms), int(number))

    def __str__(self) -> str:
        return f"{self.ms}-{self.number}"


class Contact:
    """One follower's contact with Redis. `lease_ttl_ms` is the shortest that counts."""

    def __init__(self, lease_ttl_ms: int) -> None:
        self._ttl_s = lease_ttl_ms / 1000
        self._since: float | None = None
        self._run_id = ""

    @property
    def unbroken(self) -> bool:
        """Whether Redis answered when last asked."""
        return self._since is not None

    def made(self, now: float, run_id: str, *, lost_data: bool = False) -> None:
        """Redis answered, as the process `run_id`."""
        if self._since is None or run_id != self._run_id or lost_data:
            self._since = now
            self._run_id = run_id

    def broken(self) -> None:
        """Redis did not answer."""
        self._since = None

    def is_settled(self, now: float, lease_ttl_ms: int = 0) -> bool:
        """Whether a live worker with such a lease has had the time to renew it."""
        ttl_s = max(self._ttl_s, lease_ttl_ms / 1000)
        return self._since is not None and now - self._since >= ttl_s
