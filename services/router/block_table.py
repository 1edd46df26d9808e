"""A hash table from block ids to worker bits, in arrays: the memory below `PrefixIndex`.

    keys    [capacity]      ids; 0: empty
    planes  [capacity + 1]  64 workers' bits each, at the key's position; the last
                            element is 0 for ever, so that position -1 is "nobody"

A bucket is eight neighbouring positions, a cache line of keys. An id's hash names
its bucket and, in it, its home; it lives at home, or else anywhere in the bucket,
or else not here (`place` says so). So to find one costs one line of keys, whatever
came and went before, and 512 at once are a few operations over arrays, whose cache
misses overlap: two thirds of the time that 512 dict lookups take goes into waiting
for memory when the ids are scattered in it.

The hash multiplies by an odd number drawn at random per process: nobody outside
can choose ids that fill a bucket. Knows no workers, tiers or growth. Not thread-safe.
"""

from __future__ import annotations

import secrets
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.uint64]
Positions: TypeAlias = NDArray[np.int64]

_LOG_BUCKET_LEN = 3
_BUCKET_LEN = 1 << _LOG_BUCKET_LEN
_WORD = (1 << 64) - 1
_FACTOR = secrets.randbits(64) | 1
_FACTOR_WORD = np.uint64(_FACTOR)


class BlockTable:
    """`1 << log_capacity` positions. An id is not 0."""

    def __init__(self, log_capacity: int, num_planes: int) -> None:
        self.capacity = 1 << log_capacity
        self.keys: Ids = np.zeros(self.capacity, np.uint64)
        self.planes: list[Ids] = []
        #: The same memory, for one element at a time: four times faster than through numpy.
        self.key_view = self.keys.data
        self.views: list[memoryview[int]] = []
        self._rows = self.keys.reshape(-1, _BUCKET_LEN)
        self._shift = 64 - log_capacity
        self._shift_word = np.uint64(self._shift)
        for _ in range(num_planes):
            self.add_plane()

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return self.keys.nbytes + sum(plane.nbytes for plane in self.planes)

    def add_plane(self) -> None:
        """64 more workers' bits, none set."""
        plane = np.zeros(self.capacity + 1, np.uint64)
        self.planes.append(plane)
        self.views.append(plane.data)

    def find(self, block: int) -> int:
        """Where the id is, or -1."""
        home = (block * _FACTOR & _WORD) >> self._shift
        keys = self.key_view
        if keys[home] == block:
            return home
        first = home & -_BUCKET_LEN
        bucket = keys[first : first + _BUCKET_LEN].tolist()
        return first + bucket.index(block) if block in bucket else -1

    def find_all(self, ids: Ids) -> tuple[Positions, bool]:
        """`find` for each of ids [n]: positions [n], and whether none of them is -1.

        For an id 0, -1 or an empty position.
        """
        hashed = ids * _FACTOR_WORD
        hashed >>= self._shift_word
        found: Positions = hashed.view(np.int64)
        away = (self.keys.take(found) != ids).nonzero()[0]
        if not away.size:
            return found, True
        wanted = ids.take(away)
        buckets = found.take(away) >> _LOG_BUCKET_LEN
        among = (self._rows.take(buckets, axis=0) == wanted[:, None]).ravel().nonzero()[0]
        # An id 0 equals every empty position of its bucket.
        is_complete = among.size == away.size and bool(wanted.all())
        if not is_complete:
            row = among >> _LOG_BUCKET_LEN
            found[away] = -1
            away, buckets = away.take(row), buckets.take(row)
        found[away] = (buckets << _LOG_BUCKET_LEN) + (among & _BUCKET_LEN - 1)
        return found, is_complete

    def place(self, block: int) -> int:
        """A position for an id that is not here, taken from now on; -1 if its bucket is full."""
        home = (block * _FACTOR & _WORD) >> self._shift
        keys = self.key_view
        if keys[home]:
            first = home & -_BUCKET_LEN
            bucket = keys[first : first + _BUCKET_LEN].tolist()
            if 0 not in bucket:
                return -1
            home = first + bucket.index(0)
        keys[home] = block
        return home

    def place_all(self, ids: Ids) -> Positions:
        """`place` for each of ids [n], all different: positions [n]."""
        homes: Positions = ((ids * _FACTOR_WORD) >> self._shift_word).view(np.int64)
        free = (self.keys.take(homes) == 0).nonzero()[0]
        _, first = np.unique(homes[free], return_index=True)
        settled = free[first]
        self.keys[homes[settled]] = ids[settled]
        placed = np.full(len(ids), -1, np.int64)
        placed[settled] = homes[settled]
        for number in (placed < 0).nonzero()[0].tolist():
            placed[number] = self.place(int(ids[number]))
        return placed

    def touch(self, start: int, end: int) -> None:
        """Have memory behind positions start … end-1 of a table that is still empty."""
        for array in (self.keys, *self.planes):
            array[start:end] = 0

    def masks(self, position: int) -> int:
        """All planes' bits there, the first plane's lowest."""
        together = 0
        for number, view in enumerate(self.views):
            together |= view[position] << (64 * number)
        return together

    def set_masks(self, position: int, together: int) -> None:
        """The inverse of `masks`. Without any bit the position is empty again."""
        for view in self.views:
            view[position] = together & _WORD
            together >>= 64

    def erase(self, position: int) -> None:
        """The position, whose bits are all gone, is empty."""
        self.key_view[position] = 0

    def retain(self, start: int, end: int, kept: list[int]) -> int:
        """Leave only `kept` bits, by plane, at positions start … end-1.

        Returns how many ids that erased.
        """
        keys = self.keys[start:end]
        empty = keys != 0
        for plane, bits in zip(self.planes, kept, strict=True):
            part = plane[start:end]
            part &= np.uint64(bits)
            empty &= part == 0
        keys[empty] = 0
        return int(np.count_nonzero(empty))

    def holders(self, plane: int, bit: int) -> set[int]:
        """The ids that have `bit` in `plane`. Reads the whole table."""
        owned = (self.planes[plane][:-1] & np.uint64(bit)) != 0
        return set(self.keys[owned].tolist())
