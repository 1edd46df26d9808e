"""Who takes what, without anybody keeping a table: the highest random weight wins.

Thaler and Ravishankar, "A name-based mapping scheme for rendezvous" (1996). When one
of n takers is gone, its share goes to all others alike, and nothing else moves. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

_WORD = (1 << 64) - 1


class Taker(Protocol):
    """Somebody with 64 random bits that everybody knows."""

    seed: int


T = TypeVar("T", bound=Taker)


def in_order(key: int, takers: Iterable[T]) -> list[T]:
    """The takers of `key` (64 bits): the first takes it, or else the next."""
    return sorted(takers, key=lambda taker: _weight(key, taker.seed), reverse=True)


def _weight(key: int, seed: int) -> int:
    """Two words into one, every bit depending on all (splitmix64's finalizer)."""
    mixed = (key ^ seed) * 0xBF58476D1CE4E5B9 & _WORD
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _WORD
    return mixed ^ mixed >> 31
