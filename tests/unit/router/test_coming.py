from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router import coming as module
from services.router.coming import Coming
from services.router.reservations import GRACE_S, Reservation, Reservations, WorkerKey

ONE, TWO = WorkerKey("one", 1), WorkerKey("two", 1)


def test_how_far_a_prompt_will_reach() -> None:
    coming = Coming()
    coming.add(ONE, [13, 14, 15])  # Blocks 3, 4, 5 of a prompt whose first three are there.
    assert coming.reach(ONE, [10, 11, 12, 13, 14, 25, 26], 3) == 5
    assert coming.reach(ONE, [10, 11, 12, 13, 14, 15], 3) == 6
    # Less is cached by now than was when it was sent: nobody knows the gap.
    assert coming.reach(ONE, [10, 11, 12, 13, 14, 15], 2) == 2
    assert coming.reach(TWO, [10, 11, 12, 13], 3) == 3
    assert coming.reach(ONE, [], 0) == 0
    assert coming.reach(ONE, [13], 1) == 1


def test_an_id_stays_until_its_last_reservation_ends() -> None:
    coming = Coming()
    coming.add(ONE, [1, 2])
    coming.add(ONE, [1, 2, 3])
    coming.remove(ONE, [1, 2])
    assert coming.reach(ONE, [1, 2, 3, 4], 0) == 3
    coming.remove(ONE, [1, 2, 3])
    assert (len(coming), coming.workers) == (0, {})


def test_a_worker_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IDS", 4)
    reservations = Reservations()
    reservations.open("g", 0, ())
    for number in range(4):
        ids = range(10 * number, 10 * number + 3)
        reservations.reserve("g", number, Reservation(ONE, 48, 4, 1, list(ids)))
    assert len(reservations.coming) == 3
    for number in range(4):
        reservations.release("g", number)
    assert (len(reservations), len(reservations.coming)) == (0, 0)


def test_what_comes_ends_with_its_reservation_whatever_ends_that() -> None:
    reservations = Reservations()
    reservations.open("g", "first", ())
    for number, worker in enumerate((ONE, ONE, TWO, TWO)):
        reservations.reserve("g", number, Reservation(worker, 32, 3, 1, [number, 100]))
    assert len(reservations.coming) == 6
    reservations.release("g", 0)
    assert len(reservations.coming) == 5
    reservations.drop_worker(TWO)
    assert len(reservations.coming) == 2
    # Announced anew without its ids, which are still known; elsewhere they are not.
    reservations.open("g", "second", [(1, Reservation(ONE, 32, 3, 1))])
    assert reservations.coming.reach(ONE, [1, 100], 0) == 2
    reservations.open("g", "third", [(1, Reservation(TWO, 32, 3, 1))])
    assert len(reservations.coming) == 0
    reservations.reserve("g", 5, Reservation(ONE, 32, 3, 1, [5]))
    reservations.lost("g", "third", 0.0)
    reservations.expire(GRACE_S)
    assert len(reservations.coming) == 0


prompts = st.lists(
    # Each number stands for a branch: ids as hashes of all before them.
    st.lists(st.integers(0, 1), min_size=1, max_size=12).map(
        lambda branch: [hash(tuple(branch[: n + 1])) for n in range(len(branch))]
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(prompts, st.data())
def test_bisection_finds_what_a_walk_does(sent: list[list[int]], data: st.DataObject) -> None:
    coming = Coming()
    for ids in sent:
        coming.add(ONE, ids)
    ids = data.draw(st.sampled_from(sent))[: data.draw(st.integers(0, 12))]
    ids = ids + [7, 8, 9][: data.draw(st.integers(0, 3))]
    known = {block for prompt in sent for block in prompt}
    walked = 0
    while walked < len(ids) and ids[walked] in known:
        walked += 1
    assert coming.reach(ONE, ids, 0) == walked
