"""Who is admitted next: the queue of waiting sequences, fair between tenants.

    priority, higher first
      └ tenant, least served first         (virtual token counters)
          └ sequence, due earliest first   (its deadline, or a while after it came)

Fairness is that of "Fairness in Serving Large Language Models" (Sheng et al., OSDI
2024): a tenant's counter grows by the tokens that it was served, one that comes
back from idleness starts at the least counter of those at work, and the tenant
with the least is next. So of tenants that always have work none gets more than its
share, whatever it submits, and none is kept waiting for long.

Within a tenant nothing starves: whoever comes later is due later than one that
has waited for `PATIENCE_S`. Between priorities it can: that is what they are for.
It knows no blocks, no clock and no step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heapify, heappop, heapreplace
from operator import attrgetter
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: Seconds after which a sequence without a deadline is due.
PATIENCE_S = 30.0
#: What a computed prompt token and a generated token count: the second takes a
#: whole pass over the weights.
PREFILL_COST = 1
DECODE_COST = 2

_ORDER = attrgetter("order")


class Waiter(Protocol):
    """What the queue reads of a sequence; order and tenant stay as they are."""

    @property
    def order(self) -> tuple[int, float, int]:
        """(negated priority, when it is due, arrival): smaller is served first."""

    @property
    def tenant(self) -> str:
        """Whose it is."""

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and generated."""


W = TypeVar("W", bound=Waiter)


class TenantCounters:
    """Tokens served to each tenant that has sequences here, waiting or running."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._num_sequences: dict[str, int] = {}

    def enter(self, tenant: str) -> None:
        """One more sequence of `tenant` is here."""
        if tenant not in self._served:
            self._served[tenant] = min(self._served.values(), default=0)
        self._num_sequences[tenant] = self._num_sequences.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """One of its sequences ended; with the last one its counter is forgotten."""
        self._num_sequences[tenant] -= 1
        if not self._num_sequences[tenant]:
            del self._num_sequences[tenant], self._served[tenant]

    def charge(self, tenant: str, tokens: int) -> None:
        """It was served so much."""
        self._served[tenant] += tokens

    def served(self, tenant: str) -> int:
        """Its counter."""
        return self._served[tenant]

    def check(self, num_sequences: Mapping[str, int]) -> None:
        """Raise AssertionError unless these are the tenants that are here. For tests."""
        assert self._num_sequences == num_sequences
        assert self._served.keys() == num_sequences.keys()


class WaitingQueue(Generic[W]):
    """Sequences that wait."""

    def __init__(self, counters: TenantCounters) -> None:
        self._counters = counters
        #: Negated priority -> tenant -> its sequences in order; none is empty.
        self._levels: dict[int, dict[str, list[W]]] = {}
        self._len = 0

    def __len__(self) -> int:
        return self._len

    @property
    def is_head_fixed(self) -> bool:
        """Whether who is first depends on no tenant's counter."""
        return not self._levels or len(self._levels[min(self._levels)]) == 1

    def __iter__(self) -> Iterator[W]:
        """All, as they should be admitted if nothing changes. Changes nothing itself."""
        for level in sorted(self._levels):
            tenants = self._levels[level]
            if len(tenants) == 1:
                yield from next(iter(tenants.values()))
            else:
                yield from self._fairly(tenants)

    def _fairly(self, tenants: dict[str, list[W]]) -> Iterator[W]:
        queues = {tenant: iter(queue) for tenant, queue in tenants.items()}
        heads = []
        for tenant, queue in queues.items():
            head = next(queue)
            heads.append((self._counters.served(tenant), head.order, tenant, head))
        heapify(heads)
        while heads:
            served, _, tenant, waiter = heads[0]
            yield waiter
            following = next(queues[tenant], None)
            if following is None:
                heappop(heads)
            else:
                served += waiter.num_tokens * PREFILL_COST
                heapreplace(heads, (served, following.order, tenant, following))

    def add(self, waiter: W) -> None:
        """Put it in its place."""
        tenants = self._levels.setdefault(waiter.order[0], {})
        insort(tenants.setdefault(waiter.tenant, []), waiter, key=_ORDER)
        self._len += 1

    def remove(self, waiter: W) -> None:
        """Take it out. Raises KeyError if it is not here."""
        tenants = self._levels[waiter.order[0]]
        queue = tenants[waiter.tenant]
        at = bisect_left(queue, waiter.order, key=_ORDER)
        if at == len(queue) or queue[at] is not waiter:
            raise KeyError(waiter)
        del queue[at]
        self._len -= 1
        if not queue:
            del tenants[waiter.tenant]
            if not tenants:
                del self._levels[waiter.order[0]]
