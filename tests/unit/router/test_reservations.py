from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from headrace.errors import ResourceExhausted
from services.router.reservations import (
    GRACE_S,
    MAX_PER_GATEWAY,
    Reservation,
    Reservations,
    Reserved,
    WorkerKey,
)

ONE = WorkerKey("one", 1)
TWO = WorkerKey("two", 1)


def reservation(worker: WorkerKey = ONE, tokens: int = 100) -> Reservation:
    return Reservation(worker, prefill_tokens=tokens, blocks=7, sequences=2)


@pytest.fixture
def opened() -> Reservations:
    reservations = Reservations()
    reservations.open("gateway", "connection", [])
    return reservations


def test_its_life(opened: Reservations) -> None:
    opened.reserve("gateway", 1, reservation())
    opened.reserve("gateway", 2, reservation(tokens=50))
    assert opened.load(ONE) == Reserved(150, 14, 4, 2)
    opened.prefill_done("gateway", 1)
    opened.prefill_done("gateway", 1)
    assert opened.load(ONE) == Reserved(50, 14, 4, 2)
    opened.release("gateway", 1)
    opened.release("gateway", 1)
    assert opened.load(ONE) == Reserved(50, 7, 2, 1)
    opened.release("gateway", 2)
    assert opened.load(ONE) == Reserved()


def test_a_repeated_call_counts_once(opened: Reservations) -> None:
    opened.reserve("gateway", 1, reservation(ONE))
    opened.reserve("gateway", 1, reservation(TWO))
    assert opened.load(ONE) == Reserved()
    assert opened.load(TWO).reservations == 1


def test_they_die_with_the_stream_after_its_grace(opened: Reservations) -> None:
    opened.reserve("gateway", 1, reservation())
    opened.lost("gateway", "connection", now=10.0)
    opened.expire(10.0 + GRACE_S - 0.1)
    assert opened.load(ONE).reservations == 1
    opened.expire(10.0 + GRACE_S)
    assert opened.load(ONE) == Reserved()


def test_a_gateway_that_comes_back_keeps_what_it_announces(opened: Reservations) -> None:
    for request_id in (1, 2, 3):
        opened.reserve("gateway", request_id, reservation())
    opened.lost("gateway", "connection", now=10.0)
    opened.open("gateway", "another", [(2, reservation(tokens=0)), (9, reservation(TWO))])
    opened.expire(100.0)
    assert opened.load(ONE) == Reserved(0, 7, 2, 1)
    assert opened.load(TWO).reservations == 1


def test_the_end_of_a_replaced_stream_is_ignored(opened: Reservations) -> None:
    opened.open("gateway", "another", [(1, reservation())])
    opened.lost("gateway", "connection", now=10.0)
    opened.expire(100.0)
    assert opened.load(ONE).reservations == 1


def test_they_die_with_the_generation(opened: Reservations) -> None:
    opened.reserve("gateway", 1, reservation(ONE))
    opened.reserve("gateway", 2, reservation(WorkerKey("one", 2)))
    opened.drop_worker(ONE)
    assert opened.load(ONE) == Reserved()
    assert opened.load(WorkerKey("one", 2)).reservations == 1
    opened.release("gateway", 1)
    assert len(opened) == 1


def test_a_gateway_has_a_limit(opened: Reservations) -> None:
    for request_id in range(MAX_PER_GATEWAY):
        opened.reserve("gateway", request_id, reservation())
    with pytest.raises(ResourceExhausted):
        opened.reserve("gateway", MAX_PER_GATEWAY, reservation())
    opened.reserve("gateway", 2, reservation())
    assert opened.load(ONE).reservations == MAX_PER_GATEWAY


class AgainstLists(RuleBasedStateMachine):
    """After each step a worker's load is the sum of what gateways hold there."""

    gateways = st.sampled_from(["a", "b"])
    numbers = st.integers(1, 4)
    workers = st.sampled_from([ONE, TWO])

    @initialize()
    def begin(self) -> None:
        self.reservations = Reservations()
        self.held: dict[str, dict[int, Reservation]] = {}
        self.lost_gateways: set[str] = set()

    @rule(gateway=gateways, number=numbers, worker=workers)
    def open(self, gateway: str, number: int, worker: WorkerKey) -> None:
        self.reservations.open(gateway, gateway, [(number, reservation(worker))])
        self.held[gateway] = {number: reservation(worker)}
        self.lost_gateways.discard(gateway)

    @rule(gateway=gateways)
    def lost(self, gateway: str) -> None:
        self.reservations.lost(gateway, gateway, 0.0)
        self.lost_gateways.add(gateway)

    @rule()
    def expire(self) -> None:
        self.reservations.expire(GRACE_S)
        self.held = {g: r for g, r in self.held.items() if g not in self.lost_gateways}

    @rule(gateway=gateways, number=numbers, worker=workers)
    def reserve(self, gateway: str, number: int, worker: WorkerKey) -> None:
        if gateway in self.held:
            self.reservations.reserve(gateway, number, reservation(worker))
            self.held[gateway][number] = reservation(worker)

    @rule(gateway=gateways, number=numbers)
    def prefill_done(self, gateway: str, number: int) -> None:
        self.reservations.prefill_done(gateway, number)
        if number in self.held.get(gateway, {}):
            self.held[gateway][number].prefill_tokens = 0

    @rule(gateway=gateways, number=numbers)
    def release(self, gateway: str, number: int) -> None:
        self.reservations.release(gateway, number)
        self.held.get(gateway, {}).pop(number, None)

    @rule(worker=workers)
    def drop_worker(self, worker: WorkerKey) -> None:
        self.reservations.drop_worker(worker)
        for gateway, held in self.held.items():
            self.held[gateway] = {n: r for n, r in held.items() if r.worker != worker}

    @invariant()
    def the_sums_agree(self) -> None:
        for key in (ONE, TWO):
            mine = [r for held in self.held.values() for r in held.values() if r.worker == key]
            assert self.reservations.load(key) == Reserved(
                sum(r.prefill_tokens for r in mine),
                sum(r.blocks for r in mine),
                sum(r.sequences for r in mine),
                len(mine),
            )


TestAgainstLists = AgainstLists.TestCase
TestAgainstLists.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
