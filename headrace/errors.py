"""The errors that cross a service's border, and what each becomes outside.

    HeadraceError
    ├── InvalidArgument      the request is wrong; names the field
    ├── NotFound             a model or resource that nobody serves
    ├── ResourceExhausted    a limit or a full queue; says when to come back
    ├── DeadlineExceeded     the request's time is over
    ├── Cancelled            the client went away
    ├── Unavailable          nobody can serve it now; safe to try again
    └── Internal             our fault; the text is an id to find in the logs
    StartupError             a service or command can't start: one line, cause and cure

`STATUS` maps every one of the first to gRPC and HTTP; a test holds that it is total.
No transport is imported here: codes are google.rpc.Code numbers.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple


class HeadraceError(Exception):
    """An error with a text for the client."""

    def __init__(self, message: str, *, field: str = "", retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms


class InvalidArgument(HeadraceError):
    """The request is wrong, whoever serves it."""


class NotFound(HeadraceError):
    """What the request names does not exist here."""


class ResourceExhausted(HeadraceError):
    """A limit was reached; `retry_after_ms` says when trying again may help."""


class DeadlineExceeded(HeadraceError):
    """The request's deadline passed."""


class Cancelled(HeadraceError):
    """The client cancelled."""


class Unavailable(HeadraceError):
    """Nobody can serve the request now; trying again is safe."""


class Internal(HeadraceError):
    """A fault of ours. Raise it with the `incident` under which the log has the cause."""

    def __init__(self, incident: str | None = None) -> None:
        self.incident = incident or secrets.token_hex(6)
        super().__init__(f"internal error, incident {self.incident}: see the service's log")


class StartupError(Exception):
    """A service or command can't start. The text is one line that names cause and cure."""


class Status(NamedTuple):
    """What an error becomes outside."""

    grpc_code: int
    http_status: int
    openai_type: str


STATUS: dict[type[HeadraceError], Status] = {
    InvalidArgument: Status(3, 400, "invalid_request_error"),
    NotFound: Status(5, 404, "invalid_request_error"),
    ResourceExhausted: Status(8, 429, "rate_limit_error"),
    DeadlineExceeded: Status(4, 504, "timeout_error"),
    Cancelled: Status(1, 499, "cancelled_error"),
    Unavailable: Status(14, 503, "service_unavailable_error"),
    Internal: Status(13, 500, "server_error"),
}

_BY_CODE = {status.grpc_code: kind for kind, status in STATUS.items()}


def status_of(error: HeadraceError) -> Status:
    """What `error` becomes outside."""
    return STATUS[type(error)]


def from_code(
    code: int, message: str, *, field: str = "", retry_after_ms: int = 0
) -> HeadraceError:
    """The error that another service sent. An unknown code is an Internal of its own."""
    kind = _BY_CODE.get(code)
    if kind is None or kind is Internal:
        error = Internal("unknown")
        error.message = message or error.message
        error.args = (error.message,)
        return error
    return kind(message, field=field, retry_after_ms=retry_after_ms)
