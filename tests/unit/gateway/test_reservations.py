"""The book of what is in flight: told once, announced whole after a reconnect."""

from __future__ import annotations

from typing import Any

from services.gateway.fleet import Plan, Worker, least_loaded
from services.gateway.leg import Leg
from services.gateway.peers.reservations import Reservation, ReservationBook

A = Worker("a", 1, "a:1")
B = Worker("b", 1, "b:1")


def reserve(book: ReservationBook, number: int, worker: Worker = A, sequences: int = 1) -> None:
    book.add(Reservation(number, worker, "m", 100, 8, sequences))


def test_updates_are_told_once() -> None:
    book = ReservationBook()
    reserve(book, 1)
    book.prefill_done(1)
    book.prefill_done(1)
    book.release(1)
    book.release(1)
    assert book.take_updates(10) == ([1], [1])
    assert not book.has_updates
    assert not book.load


def test_updates_are_taken_in_pieces() -> None:
    book = ReservationBook()
    for number in range(5):
        reserve(book, number)
        book.release(number)
    assert book.take_updates(3) == ([], [0, 1, 2])
    assert book.take_updates(3) == ([], [3, 4])


def test_an_announcement_replaces_the_updates_that_waited() -> None:
    book = ReservationBook()
    reserve(book, 1)
    reserve(book, 2, B, sequences=3)
    book.prefill_done(2)
    book.release(1)
    (announced,) = book.announce()
    assert (announced.id, announced.prefill_tokens, announced.num_sequences) == (2, 0, 3)
    assert not book.has_updates


def test_load_counts_sequences_by_worker() -> None:
    book = ReservationBook()
    reserve(book, 1, A)
    reserve(book, 2, B, sequences=3)
    assert book.load == {"a": 1, "b": 3}
    assert least_loaded([A, B], book.load, set()) == A
    assert least_loaded([A, B], book.load, {"a"}) == B
    assert least_loaded([A, B], book.load, {"a", "b"}) is None
    reserve(book, 3, A, sequences=2)
    assert least_loaded([A, B], book.load, set()) == A
    reserve(book, 4, A)
    assert least_loaded([A, B], book.load, set()) == B


class Told:
    """What a router would be told."""

    def __init__(self) -> None:
        self.words: list[tuple[str, int]] = []

    def prefill_done(self, number: int) -> None:
        self.words.append(("prefill done", number))

    def release(self, number: int) -> None:
        self.words.append(("released", number))


def test_a_leg_is_over_when_its_last_sequence_leaves() -> None:
    router: Any = Told()
    leg = Leg(router, Plan(A, 7), num_sequences=3)
    leg.first_token()
    leg.first_token()
    leg.leave()
    leg.leave()
    assert router.words == [("prefill done", 7)]
    leg.leave()
    assert router.words == [("prefill done", 7), ("released", 7)]


def test_another_router_takes_over_what_is_left() -> None:
    gone, heir = ReservationBook(), ReservationBook()
    for number in (1, 2, 3):
        reserve(gone, number)
    gone.prefill_done(2)
    gone.release(3)
    for reservation in gone.hand_over():
        heir.adopt(reservation)
    # A router that is not gone, but was only out of reach, lets go of them.
    assert gone.take_updates(10) == ([2], [3, 1, 2])
    assert not gone.load
    assert heir.has_updates
    heir.prefill_done(1)
    heir.release(2)
    assert [(r.id, r.prefill_tokens) for r in heir.take_adopted(10)] == [(1, 0)]
    assert heir.take_updates(10) == ([1], [2])
    assert not heir.has_updates
    assert heir.load == {"a": 1}


def test_a_new_stream_announces_what_was_adopted() -> None:
    book = ReservationBook()
    book.adopt(Reservation(5, A, "m", 100, 8, 1))
    assert [entry.id for entry in book.announce()] == [5]
    assert not book.has_updates
