from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import DeadlineExceeded, ResourceExhausted
from services.router import waiting as module
from services.router.policies import RoutingRequest
from services.router.waiting import MAX_RETRY_MS, UNKNOWN_RETRY_MS, Waiter, Waiting


def waiter(
    number: int,
    priority: int = 0,
    deadline: float = math.inf,
    *,
    gateway: str = "g",
    model: str = "m",
    blocks: int = 1,
) -> Waiter:
    request = RoutingRequest(num_tokens=16 * blocks, priority=priority)
    return Waiter(gateway, number, model, [number] * blocks, request, 0.0, deadline)


def numbers(waiting: Waiting, model: str = "m") -> list[int]:
    return [entry.request_id for entry in waiting.line(model)]


def test_order_is_priority_then_deadline_then_arrival() -> None:
    waiting = Waiting()
    waiting.add(waiter(1), 0.0)
    waiting.add(waiter(2, deadline=9.0), 0.0)
    waiting.add(waiter(3, deadline=5.0), 0.0)
    waiting.add(waiter(4, priority=1), 0.0)
    waiting.add(waiter(5), 0.0)
    waiting.add(waiter(6, priority=-1, deadline=1.0), 0.0)
    waiting.add(waiter(7, model="other"), 0.0)
    assert numbers(waiting) == [4, 3, 2, 1, 5, 6]
    assert numbers(waiting, "other") == [7]
    assert waiting.models == ["m", "other"]


def test_beyond_the_limit_it_refuses_with_a_hint() -> None:
    waiting = Waiting(limit=2)
    waiting.add(waiter(1), 0.0)
    waiting.add(waiter(2), 0.0)
    with pytest.raises(ResourceExhausted, match=r"2 requests wait already \(limit 2\)") as caught:
        waiting.add(waiter(3), 0.0)
    assert caught.value.retry_after_ms == UNKNOWN_RETRY_MS
    assert numbers(waiting) == [1, 2]
    # A place in another model's line is one of the same places.
    with pytest.raises(ResourceExhausted):
        waiting.add(waiter(3, model="other"), 0.0)
    assert waiting.models == ["m"]


def test_a_higher_priority_takes_the_place_of_the_last() -> None:
    waiting = Waiting(limit=2)
    first, last = waiter(1), waiter(2, priority=-1)
    waiting.add(last, 0.0)
    waiting.add(first, 0.0)
    assert waiting.add(waiter(3, priority=5), 0.0) is last
    assert numbers(waiting) == [3, 1]
    assert waiting.find("g", 2) is None


def test_ids_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_IDS", 100)
    waiting = Waiting()
    waiting.add(waiter(1, blocks=90), 0.0)
    with pytest.raises(ResourceExhausted):
        waiting.add(waiter(2, blocks=11), 0.0)
    waiting.add(waiter(3, blocks=10), 0.0)
    # The last would have to go for one of a higher priority, and it is not enough.
    with pytest.raises(ResourceExhausted):
        waiting.add(waiter(4, priority=1, blocks=50), 0.0)
    assert numbers(waiting) == [1, 3]


def test_the_hint_follows_the_lines_speed() -> None:
    waiting = Waiting(limit=20)
    for number in range(20):
        waiting.add(waiter(number), 0.0)
    for number, entry in enumerate(waiting.line("m")[:5]):
        waiting.placed(entry, 1.0 + number / 2)
    # Two a second: 15 take 7.5 s.
    assert waiting.per_s("m", 3.0) == 2.0
    assert waiting.retry_after_ms("m", 3.0) == 7500
    # Nothing moves any more.
    assert waiting.retry_after_ms("m", 1000.0) == MAX_RETRY_MS
    state = waiting.state("m", 3.0)
    assert (state.waiting, state.limit, state.per_s, state.wait_s) == (15, 20, 2.0, 8.0)
    for entry in waiting.line("m"):
        waiting.remove(entry)
    # A line that ended says nothing of the next.
    waiting.add(waiter(50), 2000.0)
    assert waiting.per_s("m", 2000.0) == 0.0


def test_a_deadline_before_its_turn_is_refused_at_once() -> None:
    waiting = Waiting()
    for number in range(15):
        waiting.add(waiter(number), 0.0)
    # Nobody knows how fast it will go: it may come in time.
    waiting.add(waiter(15, deadline=0.1), 0.0)
    for number, entry in enumerate(waiting.line("m")[:5]):
        waiting.placed(entry, 1.0 + number)
    # It would be the first of all, in a second.
    waiting.add(waiter(16, deadline=6.1), 5.0)
    with pytest.raises(DeadlineExceeded, match=r"1 requests wait .* about 2.0 s; it has 1.9 s"):
        waiting.add(waiter(17, deadline=6.9), 5.0)
    # And one of a low priority behind all twelve.
    with pytest.raises(DeadlineExceeded):
        waiting.add(waiter(18, priority=-1, deadline=17.0), 5.0)
    waiting.add(waiter(19, priority=-1, deadline=19.0), 5.0)


def test_overdue_and_the_next_deadline() -> None:
    waiting = Waiting()
    assert waiting.next_deadline == math.inf
    entries = [waiter(number, deadline=10.0 - number) for number in range(4)]
    for entry in entries:
        waiting.add(entry, 0.0)
    waiting.add(waiter(9), 0.0)
    assert waiting.next_deadline == 7.0
    assert [entry.request_id for entry in waiting.overdue(8.5)] == [3, 2]
    waiting.remove(entries[3])
    waiting.remove(entries[2])
    assert waiting.next_deadline == 9.0
    assert waiting.overdue(8.5) == []


def test_what_a_lost_gateway_left_is_forgotten_after_the_grace() -> None:
    waiting = Waiting()
    for number in (1, 2):
        waiting.add(waiter(number), 0.0)
    waiting.add(waiter(3, gateway="other"), 0.0)
    waiting.lost("g", 5.0)
    waiting.lost("g", 6.0)
    claimed = waiting.find("g", 2)
    assert claimed is not None
    claimed.unclaimed_since = None
    waiting.expire(6.9, 2.0)
    assert numbers(waiting) == [1, 2, 3]
    waiting.expire(7.0, 2.0)
    assert numbers(waiting) == [2, 3]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "place", "remove"]),
            st.integers(0, 40),
            st.integers(-2, 2),
            st.one_of(st.just(math.inf), st.integers(1, 50).map(float)),
        ),
        max_size=60,
    )
)
def test_it_is_a_sorted_list(steps: list[tuple[str, int, int, float]]) -> None:
    waiting = Waiting(limit=10)
    kept: list[Waiter] = []
    for action, number, priority, deadline in steps:
        if action == "add" and waiting.find("g", number) is None:
            entry = waiter(number, priority, deadline, model="ab"[number % 2])
            try:
                displaced = waiting.add(entry, 0.0)
            except ResourceExhausted:
                assert len(kept) == 10
                same = [w for w in kept if w.model == entry.model]
                assert all(w.request.priority >= priority for w in same)
                continue
            if displaced is not None:
                kept.remove(displaced)
                assert displaced.request.priority < priority
            kept.append(entry)
        elif kept and action != "add":
            entry = kept.pop(number % len(kept))
            (waiting.remove if action == "remove" else lambda w: waiting.placed(w, 0.0))(entry)
        kept.sort(key=lambda w: w.order)
        assert [w for model in "ab" for w in waiting.line(model)] == [
            w for model in "ab" for w in kept if w.model == model
        ]
        assert len(waiting) == len(kept) <= 10
        assert waiting.next_deadline == min((w.deadline for w in kept), default=math.inf)
    for entry in kept:
        waiting.remove(entry)
    assert (len(waiting), waiting.models, waiting._num_ids, waiting._deadlines) == (0, [], 0, [])
