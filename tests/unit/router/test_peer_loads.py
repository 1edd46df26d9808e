"""Other routers' loads: what they say stands, and goes with them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.router.peer_loads import PeerLoads
from services.router.reservations import Reservation, Reservations, Reserved, WorkerKey

A, B = WorkerKey("a", 1), WorkerKey("b", 7)
LOADS = st.builds(Reserved, *[st.integers(0, 100)] * 3, st.integers(0, 3))
WORDS = st.tuples(
    st.sampled_from("xyz"), st.lists(st.tuples(st.sampled_from([A, B]), LOADS)) | st.none()
)


@given(st.lists(WORDS))
def test_the_load_is_what_the_peers_that_are_there_said_last(
    words: list[tuple[str, list[tuple[WorkerKey, Reserved]] | None]],
) -> None:
    loads = PeerLoads()
    last: dict[str, dict[WorkerKey, Reserved]] = {}
    for peer, said in words:
        if said is None:
            loads.forget(peer)
            last.pop(peer, None)
        else:
            loads.said(peer, said)
            last.setdefault(peer, {}).update(said)
    for worker in (A, B):
        there = [told[worker] for told in last.values() if worker in told]
        there = [reserved for reserved in there if reserved.reservations]
        total = loads.load(worker)
        assert total.prefill_tokens == sum(reserved.prefill_tokens for reserved in there)
        assert total.sequences == sum(reserved.sequences for reserved in there)
        assert total.reservations == sum(reserved.reservations for reserved in there)


def test_a_follower_hears_of_every_worker_whose_load_changed() -> None:
    reservations = Reservations()
    reservations.open("g", 0, [(1, Reservation(A, 10, 1, 1))])
    woken: list[int] = []
    changes = reservations.follow(lambda: woken.append(1))
    assert changes.take() == {A}
    reservations.reserve("g", 2, Reservation(B, 10, 1, 1))
    reservations.reserve("g", 3, Reservation(B, 10, 1, 1))
    assert woken == [1]
    assert changes.take() == {B}
    reservations.prefill_done("g", 3)
    reservations.release("g", 1)
    assert changes.take() == {A, B}
    reservations.drop_worker(B)
    assert changes.take() == {B}
    assert reservations.load(B) == Reserved()
    reservations.unfollow(changes)
    reservations.reserve("g", 4, Reservation(A, 10, 1, 1))
    assert changes.take() == set()
