"""The waiting queue: priorities, tenants' shares, deadlines; against a plain twin."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.scheduling import TenantCounters, WaitingQueue


@dataclass(frozen=True)
class Waiter:
    order: tuple[int, float, int]
    tenant: str
    num_tokens: int = 1


def queue_of(*waiters: Waiter, served: dict[str, int] | None = None) -> WaitingQueue[Waiter]:
    counters = TenantCounters()
    queue: WaitingQueue[Waiter] = WaitingQueue(counters)
    for waiter in waiters:
        counters.enter(waiter.tenant)
        queue.add(waiter)
    for tenant, tokens in (served or {}).items():
        counters.charge(tenant, tokens)
    return queue


def test_one_tenant_is_served_by_priority_then_when_due() -> None:
    late, early, high = Waiter((0, 9, 1), "a"), Waiter((0, 5, 2), "a"), Waiter((-1, 9, 3), "a")
    assert list(queue_of(late, early, high)) == [high, early, late]


def test_the_tenant_that_was_served_least_goes_first() -> None:
    many = [Waiter((0, n, n), "many", 10) for n in range(3)]
    few = [Waiter((0, n, n), "few", 10) for n in range(10, 12)]
    assert list(queue_of(*many, *few, served={"many": 15})) == [
        few[0], few[1], many[0], many[1], many[2],
    ]  # fmt: skip


def test_who_comes_back_does_not_collect_what_it_left_unused() -> None:
    counters = TenantCounters()
    counters.enter("busy")
    counters.charge("busy", 1000)
    counters.enter("back")
    assert counters.served("back") == 1000
    counters.leave("back")
    counters.leave("busy")
    counters.check({})


def test_removing_what_is_not_there_is_an_error() -> None:
    here = Waiter((0, 1, 1), "a")
    queue = queue_of(here)
    with pytest.raises(KeyError):
        queue.remove(Waiter((0, 1, 1), "a"))
    with pytest.raises(KeyError):
        queue.remove(Waiter((0, 2, 2), "a"))
    queue.remove(here)
    assert (list(queue), len(queue)) == ([], 0)


@given(
    st.lists(
        st.tuples(st.integers(-1, 0), st.integers(0, 3), st.sampled_from("abc"), st.integers(1, 9)),
        max_size=12,
    ),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 20)),
)
def test_order_equals_its_definition(
    entries: list[tuple[int, int, str, int]], served: dict[str, int]
) -> None:
    waiters = [
        Waiter((level, due, arrival), tenant, length)
        for arrival, (level, due, tenant, length) in enumerate(entries)
    ]
    tenants = {waiter.tenant for waiter in waiters}
    counters = {tenant: served.get(tenant, 0) for tenant in tenants}
    queue = queue_of(*waiters, served=counters)
    assert len(queue) == len(waiters)

    expected = []
    for level in (-1, 0):
        left = sorted((w for w in waiters if w.order[0] == level), key=lambda w: w.order)
        totals = dict(counters)
        while left:
            heads = {w.tenant: w for w in reversed(left)}
            best = min(heads.values(), key=lambda w: (totals[w.tenant], w.order))
            expected.append(best)
            left.remove(best)
            totals[best.tenant] += best.num_tokens
    assert list(queue) == expected
