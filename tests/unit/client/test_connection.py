"""When the client tries again, and how long it waits."""

from __future__ import annotations

import pytest

import headrace
from headrace.client.connection import Attempts, call_metadata, is_safe_to_retry, only_model
from headrace.errors import (
    DeadlineExceeded,
    HeadraceError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_only_what_is_safe_is_tried_again() -> None:
    assert is_safe_to_retry(Unavailable("x"))
    assert is_safe_to_retry(ResourceExhausted("x", retry_after_ms=5))
    assert not is_safe_to_retry(ResourceExhausted("the client reads too slowly"))
    assert not is_safe_to_retry(InvalidArgument("x"))
    assert not is_safe_to_retry(Internal())


def test_waits_grow_and_add_to_what_the_server_says() -> None:
    error = Unavailable("x", retry_after_ms=2000)
    longest = Attempts(60, 4, Clock(), lambda low, high: high)
    assert [longest.wait_s(error) for _ in range(4)] == pytest.approx([2.1, 2.2, 2.4, 2.8])
    with pytest.raises(Unavailable):
        longest.wait_s(error)
    shortest = Attempts(60, 4, Clock(), lambda low, high: low)
    assert shortest.wait_s(Unavailable("x")) == 0


def test_no_attempt_beyond_the_deadline() -> None:
    clock = Clock()
    attempts = Attempts(3, 9, clock, lambda low, high: high)
    assert attempts.remaining_s() == pytest.approx(3)
    with pytest.raises(Unavailable):
        attempts.wait_s(Unavailable("x", retry_after_ms=2950))
    clock.now += 3.1
    with pytest.raises(DeadlineExceeded, match="3 s"):
        attempts.remaining_s()


def test_the_only_model() -> None:
    assert only_model(["a"]) == "a"
    with pytest.raises(InvalidArgument, match="a, b"):
        only_model(["a", "b"])
    with pytest.raises(InvalidArgument, match="none at the moment"):
        only_model([])


def test_a_key_goes_along_as_a_bearer_token() -> None:
    assert call_metadata("secret") == (("authorization", "Bearer secret"),)
    assert call_metadata(None) == ()


def test_the_package_offers_its_clients() -> None:
    assert headrace.Client.__module__ == "headrace.client.sync"
    assert issubclass(HeadraceError, Exception)
    with pytest.raises(AttributeError):
        _ = headrace.Nothing
