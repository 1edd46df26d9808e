from __future__ import annotations

from services.router.contact import Contact, StreamId

TTL_S = 6.0


def test_it_settles_after_a_whole_ttl_without_a_break() -> None:
    contact = Contact(6000)
    assert not contact.is_settled(100.0)
    contact.made(100.0, "a")
    contact.made(100.0 + TTL_S / 2, "a")
    assert not contact.is_settled(100.0 + TTL_S - 0.1)
    assert contact.is_settled(100.0 + TTL_S)


def test_an_outage_a_restart_and_a_loss_of_data_begin_anew() -> None:
    for what in ("outage", "restart", "loss"):
        contact = Contact(6000)
        contact.made(100.0, "a")
        if what == "outage":
            contact.broken()
            assert not contact.unbroken
        contact.made(200.0, "b" if what == "restart" else "a", lost_data=what == "loss")
        assert contact.unbroken
        assert not contact.is_settled(200.0 + TTL_S - 0.1), what
        assert contact.is_settled(200.0 + TTL_S), what


def test_stream_ids_are_ordered_by_number_not_by_text() -> None:
    assert StreamId.parse(b"99-10") > StreamId.parse(b"99-9")
    assert StreamId.parse(b"100-0") > StreamId.parse(b"99-10")
    assert str(StreamId.parse(b"99-10")) == "99-10"
