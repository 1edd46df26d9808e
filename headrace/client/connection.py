"""How clients reach a mesh, how long they wait, and when they try again. No I/O.

A call is tried again only while nothing of its answer came, and only when the
server said that this is safe: UNAVAILABLE, or RESOURCE_EXHAUSTED with a time to
come back. Waits grow from attempt to attempt and are drawn at random ("full jitter",
https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/), on top of
the time that the server named.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from headrace import errors
from headrace.errors import DeadlineExceeded, HeadraceError, ResourceExhausted, Unavailable
from headrace.rpc.errors import read_details

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_RETRIES = 3
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_MAX_MESSAGE_LEN = 64 << 20

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_LEN),
    ("grpc.keepalive_time_ms", 60_000),
    # A name with several addresses is several gateways: use all of them.
    ("grpc.lb_policy_name", "round_robin"),
]

#: False: no TLS; True: with the system's roots; bytes: with these roots, PEM.
Tls = bool | bytes | grpc.ChannelCredentials


def credentials(tls: Tls) -> grpc.ChannelCredentials | None:
    """Channel credentials; None for a plain connection."""
    if isinstance(tls, bool):
        return grpc.ssl_channel_credentials() if tls else None
    return grpc.ssl_channel_credentials(tls) if isinstance(tls, bytes) else tls


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What every call says of itself."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def error_of(error: grpc.RpcError) -> HeadraceError:
    """Our error for a failed call, with the field and the time that its details name."""
    failed: Any = error
    code: grpc.StatusCode = failed.code()
    field, retry_after_ms = read_details(failed.trailing_metadata())
    text = failed.details() or code.name
    return errors.from_code(code.value[0], text, field=field, retry_after_ms=retry_after_ms)


@dataclass(slots=True)
class Attempts:
    """One call's deadline and its attempts."""

    timeout_s: float
    max_retries: int
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[float, float], float] = random.uniform
    _deadline: float = 0.0
    _failed: int = 0

    def __post_init__(self) -> None:
        self._deadline = self.clock() + self.timeout_s

    def remaining_s(self) -> float:
        """What is left of the call's time. Raises DeadlineExceeded if nothing is."""
        remaining = self._deadline - self.clock()
        if remaining <= 0:
            raise DeadlineExceeded(f"the call took longer than its {self.timeout_s:g} s")
        return remaining

    def wait_s(self, error: HeadraceError) -> float:
        """How long to wait before the next attempt. Raises `error` if there is to be none."""
        self._failed += 1
        if self._failed > self.max_retries or not is_safe_to_retry(error):
            raise error
        longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (self._failed - 1))
        wait_s = error.retry_after_ms / 1000 + self.draw(0.0, longest)
        if self.clock() + wait_s >= self._deadline:
            raise error
        return wait_s


def is_safe_to_retry(error: HeadraceError) -> bool:
    """Whether the server can't have begun with the call, or says when to come back."""
    if isinstance(error, ResourceExhausted):
        return error.retry_after_ms > 0
    return isinstance(error, Unavailable)


def only_model(names: list[str]) -> str:
    """The model to ask when the caller names none."""
    if len(names) != 1:
        served = ", ".join(names) or "none at the moment"
        raise errors.InvalidArgument(f"name a model; served: {served}", field="model")
    return names[0]
