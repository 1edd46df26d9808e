"""The router's core without streams: routing, waiting, and that nothing is left behind."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from headrace.errors import (
    DeadlineExceeded,
    HeadraceError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from headrace.registry import ModelCard, WorkerCard
from services.router.fleet import Fleet, ReportedLoad
from services.router.objectives import Objective, Objectives
from services.router.policies import Candidate, Choice, RoutingRequest
from services.router.reservations import GRACE_S, Reserved
from services.router.service import (
    FEW_BLOCKED,
    MAX_BLOCKED,
    PACE_S,
    PATIENCE_S,
    Decision,
    Router,
)

MODEL = ModelCard("m", "r", "d", context_len=65536, block_size=16)
LIMIT = 3


class Holder:
    """The worker that holds most of the prompt, then the emptiest; room for `max_sequences`."""

    name = "holder"

    def choose(self, request: RoutingRequest, candidates: Sequence[Candidate]) -> Choice | None:
        pool = [c for c in candidates if c.worker_id not in request.exclude_workers]
        if not pool:
            return None
        best = min(pool, key=lambda c: (-c.matched_tokens, c.load.sequences))
        return Choice(best, 1.0, best.load.sequences < best.load.max_sequences)

    def explain(
        self, request: RoutingRequest, candidates: Sequence[Candidate]
    ) -> list[dict[str, float]]:
        return [{"one": 1.0} for _ in candidates]


def make(
    num_workers: int = 2, max_sequences: int = 1, max_waiting: int = 100, **options: Objectives
) -> Router:
    fleet = Fleet()
    router = Router(fleet, Holder(), max_waiting=max_waiting, **options)
    fleet.set_model(MODEL)
    for number in range(num_workers):
        join(router, number, max_sequences)
    router.open("g", "stream", (), 0.0)
    return router


def join(
    router: Router,
    number: int,
    max_sequences: int = 1,
    generation: int = 1,
    tiers: tuple[str, ...] = ("device",),
    tier_ms: tuple[float, ...] = (),
) -> None:
    card = WorkerCard(
        f"w{number}", generation, "a:1", MODEL, "sim", "", 1000, tiers=tiers,
        max_sequences=max_sequences, tier_ms_per_block=tier_ms,
    )  # fmt: skip
    router.fleet.join("m", card)
    router.fleet.report("m", card.worker_id, ReportedLoad())


def ask(
    router: Router,
    call: int,
    now: float = 0.0,
    ids: Sequence[int] = (),
    gateway: str = "g",
    **fields: object,
) -> Decision | None:
    ids = ids or [1000 * call + 1, 1000 * call + 2]
    request = router.request("m", ids, len(ids) * 16 + 5, **fields)
    return router.route(gateway, call, "m", ids, request, now)


def placed(router: Router, now: float) -> list[int]:
    """Calls that `admit` gives a worker; nothing else may come of it."""
    admitted = router.admit(now)
    assert all(isinstance(entry.outcome, Decision) for entry in admitted)
    return [entry.request_id for entry in admitted]


def release(router: Router, call: int) -> None:
    router.reservations.release("g", call)


def test_a_request_knows_its_family_its_turn_and_what_is_wanted() -> None:
    objectives = Objectives(Objective(300, 20), {"m": Objective(500, 40)})
    router = make(objectives=objectives)
    request = router.request("m", [1, 2, 3, 4, 5], 90, priority=3, session_id="s")
    assert (request.slo_ttft_ms, request.slo_itl_ms) == (500, 40)
    assert (request.prefix_hash, request.priority, request.session_id) == (4, 3, "s")
    assert router.request("m", [7], 20).prefix_hash == 7
    assert router.request("m", [], 3).prefix_hash == 0
    assert router.request("other", [], 3).slo_ttft_ms == 300
    before = request.turn
    ask(router, 1)
    assert router.request("m", [], 3).turn == before + 1


def test_what_waits_is_placed_in_order_as_room_comes() -> None:
    router = make(num_workers=2)
    assert all(ask(router, call) for call in (1, 2))
    assert not any(ask(router, call) for call in (3, 4))
    assert ask(router, 5, priority=1) is None
    assert ask(router, 6, timeout_ms=60_000) is None
    assert placed(router, 1.0) == []
    release(router, 1)
    assert placed(router, 1.0) == [5]
    assert placed(router, 1.0) == []
    release(router, 2)
    release(router, 5)
    # A newcomer does not overtake those who wait, though there is room.
    assert ask(router, 7) is None
    assert placed(router, 1.0) == [6, 3]
    router.cancel("g", 4)
    release(router, 3)
    release(router, 6)
    assert placed(router, 1.0) == [7]
    assert ask(router, 8) is not None
    counters = router.counters
    assert (counters.decisions, counters.waits, counters.queue_cancels) == (7, 5, 1)


def test_a_worker_that_joins_is_room() -> None:
    router = make(num_workers=1)
    ask(router, 1)
    ask(router, 2)
    join(router, 5)
    (admitted,) = router.admit(0.0)
    assert isinstance(admitted.outcome, Decision)
    assert admitted.outcome.worker.key.worker_id == "w5"


def test_one_that_waits_for_its_worker_does_not_hold_back_others() -> None:
    router = make(num_workers=2)
    owner = router.fleet.models["m"].workers["w0"]
    router.fleet.index.add(owner.slot, [1, 2])
    assert ask(router, 1, ids=[1, 2]) is not None
    assert ask(router, 2, ids=[1, 2]) is None
    assert ask(router, 3, ids=[1, 2], priority=-1) is None
    assert ask(router, 4, ids=[50], priority=-2) is None
    # The two that want w0 stay in order; the one that does not gets w1.
    assert placed(router, 0.0) == [4]
    release(router, 1)
    assert placed(router, 0.0) == [2]


def sized_router() -> Router:
    class Sized(Holder):
        def choose(self, request: RoutingRequest, candidates: Sequence[Candidate]) -> Choice | None:
            best = candidates[0]
            return Choice(best, 1.0, best.load.sequences + request.num_sequences <= 3)

    router = make(num_workers=1)
    router.policy = Sized()
    assert ask(router, 1, num_sequences=2)
    return router


def test_a_small_one_takes_the_room_that_is_too_little_for_another() -> None:
    router = sized_router()
    assert ask(router, 2, num_sequences=2) is None
    assert ask(router, 3, num_sequences=1) is None
    assert placed(router, 0.0) == [3]


def test_nobody_overtakes_one_that_has_waited_for_long() -> None:
    router = sized_router()
    assert ask(router, 2, num_sequences=2) is None
    assert ask(router, 3, now=PATIENCE_S, num_sequences=1) is None
    assert placed(router, PATIENCE_S) == []
    release(router, 1)
    assert placed(router, PATIENCE_S) == [2, 3]


@pytest.mark.parametrize("first", [{"priority": 1}, {"timeout_ms": 60_000}])
def test_nobody_overtakes_a_higher_priority_or_an_earlier_deadline(first: dict[str, int]) -> None:
    router = sized_router()
    assert ask(router, 2, num_sequences=2, **first) is None
    assert ask(router, 3, num_sequences=1) is None
    assert placed(router, 0.0) == []


def test_only_so_many_are_looked_at_and_not_at_once_again() -> None:
    router = make(num_workers=2)
    owner = router.fleet.models["m"].workers["w0"]
    router.fleet.index.add(owner.slot, [1, 2])
    ask(router, 1, ids=[1, 2])
    for call in range(2, 2 + MAX_BLOCKED):
        ask(router, call, ids=[1, 2])
    ask(router, 90, ids=[50])
    assert placed(router, 0.0) == []
    assert router.next_at == math.inf
    router.cancel("g", 2)
    assert placed(router, 0.001) == []
    rest_s = (MAX_BLOCKED - FEW_BLOCKED) * PACE_S
    assert router.next_at == rest_s
    assert placed(router, rest_s) == [90]


def test_deadlines_end_the_waiting() -> None:
    router = make(num_workers=1)
    ask(router, 1)
    ask(router, 2, now=10.0, timeout_ms=3000)
    ask(router, 3, now=10.0)
    assert router.next_at == 13.0
    assert router.admit(12.9) == []
    (refused,) = router.admit(13.0)
    assert refused.request_id == 2
    assert isinstance(refused.outcome, DeadlineExceeded)
    assert "busy for the 3.0 s" in refused.outcome.message
    release(router, 1)
    (admitted,) = router.admit(14.0)
    assert isinstance(admitted.outcome, Decision)
    assert (router.counters.queue_deadlines, router.counters.refused_decisions) == (1, 1)


def test_a_policy_is_told_what_is_left_of_the_time() -> None:
    router = make(num_workers=1)
    ask(router, 1)
    ask(router, 2, now=10.0, timeout_ms=3000)
    release(router, 1)
    (admitted,) = router.admit(11.0)
    assert isinstance(admitted.outcome, Decision)
    assert admitted.outcome.request.timeout_ms == 2000


def test_too_many_are_refused_and_the_lowest_first() -> None:
    router = make(num_workers=1, max_waiting=1)
    ask(router, 1)
    ask(router, 2, priority=-1)
    with pytest.raises(ResourceExhausted) as caught:
        ask(router, 3, priority=-1)
    assert caught.value.retry_after_ms > 0
    assert ask(router, 4) is None
    assert router.next_at < 0
    (displaced,) = router.admit(0.0)
    assert displaced.request_id == 2
    assert isinstance(displaced.outcome, ResourceExhausted)
    assert router.counters.queue_refusals == 2


def test_it_does_not_wait_for_nobody() -> None:
    router = make(num_workers=1)
    ask(router, 1)
    ask(router, 2)
    with pytest.raises(Unavailable):
        ask(router, 3, exclude_workers=frozenset({"w0"}))
    router.fleet.unreachable("m", "w0", "test")
    with pytest.raises(Unavailable):
        ask(router, 4)
    # And who waited hears the same.
    (lost,) = router.admit(0.0)
    assert isinstance(lost.outcome, Unavailable)
    with pytest.raises(InvalidArgument):
        router.route("g", 1, "m", [1, 2], RoutingRequest(num_tokens=5), 0.0)
    with pytest.raises(NotFound):
        router.route("g", 1, "x", [], RoutingRequest(num_tokens=5), 0.0)


def test_a_repeated_call_keeps_its_place_over_a_reconnect() -> None:
    router = make(num_workers=1)
    for call in (1, 2, 3, 4):
        ask(router, call)
    announced = [(1, router.reservations._gateways["g"].reservations[1])]
    router.lost("g", "stream", 1.0)
    # Nobody would hear of it.
    release(router, 1)
    assert router.admit(1.0) == []
    router.reservations.reserve("g", 1, announced[0][1])
    router.open("g", "again", announced, 2.0)
    for call in (4, 2):
        assert ask(router, call, now=2.0) is None
    release(router, 1)
    assert placed(router, 2.0) == [2]
    # Call 3 was given up while there was no stream.
    release(router, 2)
    assert placed(router, 2.0) == [4]
    router.expire(2.0 + GRACE_S)
    assert len(router.waiting) == 0


def test_siblings_of_a_prompt_in_flight_see_it_coming() -> None:
    router = make(num_workers=2, max_sequences=9)
    shared = [*range(1, 9)]
    first = ask(router, 1, ids=shared)
    assert first is not None
    at = first.worker.key.worker_id
    ids = [*shared[:6], 77, 78]
    seen = {c.worker_id: c for c in candidates(router, ids, 8 * 16 + 1)}
    assert seen.pop(at)[1] == 0
    assert [c.coming_tokens for c in candidates(router, ids, 130) if c.worker_id == at] == [96]
    assert all(c.coming_tokens == c.matched_tokens == 0 for c in seen.values())
    # It computes the last token itself, whatever is there.
    assert [c.coming_tokens for c in candidates(router, ids[:6], 96) if c.worker_id == at] == [80]
    release(router, 1)
    assert all(c.coming_tokens == 0 for c in candidates(router, ids, 130))


def candidates(router: Router, ids: list[int], num_tokens: int) -> list[Candidate]:
    return router.candidates.of(router.fleet.models["m"].eligible, ids, num_tokens)


def test_blocks_in_slower_tiers_and_what_bringing_them_takes() -> None:
    router = make(num_workers=0)
    join(router, 0, tiers=("device", "host", "disk"), tier_ms=(0.0, 0.5, 2.0))
    join(router, 1, tiers=("device", "host"))
    join(router, 2)
    ids = [*range(1, 11)]
    workers = router.fleet.models["m"].workers
    index = router.fleet.index
    for name, tiers in (("w0", (2, 5, 9)), ("w1", (0, 4))):
        for tier, end in enumerate(tiers):
            index.add(workers[name].slot, ids[:end], tier)
    zero, one, two = candidates(router, ids, 161)
    assert (zero.matched_tokens, zero.slower_tokens) == (32, 7 * 16)
    assert zero.transfer_ms == 3 * 0.5 + 4 * 2.0
    # It does not say what it takes: less than computing them.
    assert (one.matched_tokens, one.slower_tokens) == (0, 64)
    assert 0 < one.transfer_ms < one.timing.prefill_ms(64)
    assert (two.slower_tokens, two.transfer_ms) == (0, 0.0)


def test_a_report_stands_for_what_it_counts_and_not_for_what_was_sent_since() -> None:
    router = make(num_workers=1, max_sequences=9)

    def prefill_tokens() -> int:
        (candidate,) = candidates(router, [], 5)
        return candidate.load.prefill_tokens

    def report(sequences: int, tokens: int) -> None:
        router.fleet.report("m", "w0", ReportedLoad(sequences, 0, tokens))

    for call in (1, 2):
        ask(router, call)  # 37 tokens
    assert prefill_tokens() == 74
    # The second one was under way when the worker said this.
    report(1, 10)
    assert prefill_tokens() == 10 + 37
    report(2, 20)
    assert prefill_tokens() == 20
    ask(router, 3)
    assert prefill_tokens() == 20 + 37
    release(router, 3)
    assert prefill_tokens() == 20
    # Both first tokens are known before the next report is here.
    for call in (1, 2):
        router.reservations.prefill_done("g", call)
    assert prefill_tokens() == 0
    # Somebody else uses the worker.
    report(5, 900)
    assert prefill_tokens() == 900
    release(router, 1)
    release(router, 2)
    assert len(router.reservations.unreported) == 0


def test_loads_follow_every_change() -> None:
    router = make(num_workers=1, max_sequences=7)

    def load() -> tuple[int, ...]:
        (candidate,) = candidates(router, [], 5)
        return candidate.load[:5]

    assert load() == (0, 0, 0, 1000, 7)
    ask(router, 1)  # 37 tokens
    assert load() == (37, 1, 3, 1000, 7)
    router.reservations.prefill_done("g", 1)
    assert load() == (0, 1, 0, 1000, 7)
    router.fleet.report("m", "w0", ReportedLoad(2, 3, 40, used_blocks=100, total_blocks=500))
    assert load() == (40, 5, 103, 500, 7)
    key = router.fleet.models["m"].workers["w0"].key
    router.peers.said("other", [(key, Reserved(64, 5, 9, 1))])
    assert load() == (64, 10, 104, 500, 7)
    router.peers.forget("other")
    release(router, 1)
    join(router, 0, max_sequences=3, generation=2)
    assert load() == (0, 0, 0, 1000, 3)


class Life(RuleBasedStateMachine):
    """Whatever happens: room is used, nobody is answered twice, and no load is left behind."""

    calls = st.integers(1, 12)
    workers = st.integers(0, 1)

    @initialize()
    def begin(self) -> None:
        self.router = make(num_workers=2, max_waiting=LIMIT)
        self.now = 0.0
        self.connected = True
        self.waits: set[int] = set()
        self.placed: set[int] = set()
        self.ended: set[int] = set()

    @rule(call=calls, priority=st.integers(0, 2), timeout_ms=st.sampled_from([0, 500, 5000]))
    def ask(self, call: int, priority: int, timeout_ms: int) -> None:
        displaced = {entry.request_id for entry in self.router._displaced}
        if not self.connected or call in self.placed | self.ended | displaced:
            return
        try:
            decision = ask(
                self.router, call, self.now, [call], priority=priority, timeout_ms=timeout_ms
            )
        except (ResourceExhausted, DeadlineExceeded, Unavailable):
            assert call not in self.waits
            self.ended.add(call)
            return
        (self.waits if decision is None else self.placed).add(call)

    @rule(passed=st.sampled_from([0.0, 0.3, 3.0]))
    def admit(self, passed: float) -> None:
        self.now += passed
        self.router.expire(self.now)
        self.forget_lost()
        for _, call, outcome in self.router.admit(self.now):
            assert call in self.waits
            self.waits.discard(call)
            (self.ended if isinstance(outcome, HeadraceError) else self.placed).add(call)
        if not any(w.unclaimed_since is not None for w in self.router.waiting.line("m")):
            eligible = self.router.fleet.models["m"].eligible
            loads = [self.router.reservations.load(worker.key).sequences for worker in eligible]
            assert not self.waits or all(loads)

    @rule(call=calls)
    def cancel_or_release(self, call: int) -> None:
        self.router.cancel("g", call)
        self.waits.discard(call)
        self.placed.discard(call)
        self.ended.add(call)

    @rule(number=workers)
    def lose_worker(self, number: int) -> None:
        worker = self.router.fleet.worker("m", f"w{number}")
        if worker is not None:
            held = self.router.reservations._gateways.get("g")
            there = held.reservations.items() if held else ()
            self.placed -= {call for call, r in there if r.worker == worker.key}
            self.router.fleet.leave("m", f"w{number}")

    @rule(number=workers)
    def worker_comes(self, number: int) -> None:
        if self.router.fleet.worker("m", f"w{number}") is None:
            join(self.router, number, generation=int(self.now * 10) + 2)

    @rule()
    def lose_gateway(self) -> None:
        self.router.lost("g", "stream", self.now)
        self.connected = False

    @rule()
    def gateway_comes(self) -> None:
        held = self.router.reservations._gateways.get("g")
        announced = [(i, r) for i, r in held.reservations.items()] if held else []
        self.router.open("g", "stream", announced, self.now)
        self.connected = True
        for call in sorted(self.waits):
            self.ask(call, 0, 0)

    def forget_lost(self) -> None:
        if not self.connected:
            self.waits = {w.request_id for w in self.router.waiting.line("m")}
            if "g" not in self.router.reservations._gateways:
                self.placed.clear()

    @invariant()
    def the_books_agree(self) -> None:
        router = self.router
        assert len(router.waiting) <= LIMIT
        displaced = {entry.request_id for entry in router._displaced}
        waiting = {waiter.request_id for waiter in router.waiting.line("m")}
        assert not waiting & displaced
        if self.connected:
            assert waiting | displaced == self.waits
        assert len(router.reservations) == len(self.placed)
        assert len(router.reservations.coming) == len(self.placed)
        assert len(router.reservations.unreported) <= len(self.placed)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
