"""Our errors on the wire, and back.

An error that ends a call carries google.rpc details in `grpc-status-details-bin`
(https://google.aip.dev/193): ErrorInfo always, BadRequest with the field at fault,
QuotaFailure for a limit, RetryInfo where trying again may help.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from headrace import errors
from headrace.errors import HeadraceError, Internal, InvalidArgument, NotFound, ResourceExhausted
from headrace.v1 import types_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.message import Message

log = logging.getLogger("headrace.rpc")

#: The metadata key of a serialized google.rpc.Status.
DETAILS_KEY = "grpc-status-details-bin"
#: gRPC's own trailer for when to try again.
PUSHBACK_KEY = "grpc-retry-pushback-ms"
#: ErrorInfo's domain.
DOMAIN = "headrace"

#: Bytes of a text in metadata, of which clients take 8 KiB together by default.
MAX_TEXT_LEN = 1000

_GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}
_REASONS = {kind: _GRPC_CODES[status.grpc_code].name for kind, status in errors.STATUS.items()}


def to_proto(error: HeadraceError) -> types_pb2.Error:
    """An error of one request, for a stream that carries many."""
    return types_pb2.Error(
        code=errors.status_of(error).grpc_code,
        message=error.message,
        field=error.field,
        retry_after_ms=error.retry_after_ms,
    )


def from_proto(error: types_pb2.Error) -> HeadraceError:
    """The inverse of `to_proto`."""
    return errors.from_code(
        error.code, error.message, field=error.field, retry_after_ms=error.retry_after_ms
    )


def from_exception(error: BaseException) -> HeadraceError:
    """Our error for any exception: an unexpected one is logged and becomes Internal."""
    if isinstance(error, HeadraceError):
        return error
    internal = Internal()
    log.error("incident %s", internal.incident, exc_info=error)
    return internal


def from_rpc(error: grpc.aio.AioRpcError, peer: str) -> HeadraceError:
    """Our error for a failed call to `peer`."""
    code: int = error.code().value[0]
    field, retry_after_ms = read_details(error.trailing_metadata())
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        text = f"{peer} does not answer: {error.details()}"
        return errors.Unavailable(text, retry_after_ms=retry_after_ms)
    text = error.details() or error.code().name
    return errors.from_code(code, text, field=field, retry_after_ms=retry_after_ms)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """End a unary or per-request call with `error`. Raises, always."""
    ours = from_exception(error)
    code = _GRPC_CODES[errors.status_of(ours).grpc_code]
    await context.abort(code, short(ours.message), trailers(ours))
    raise AssertionError("abort returned")


def trailers(error: HeadraceError) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata that ends a call with `error`, beside its status."""
    details = (DETAILS_KEY, rich_status(error).SerializeToString())
    if not error.retry_after_ms:
        return (details,)
    return (details, (PUSHBACK_KEY, str(error.retry_after_ms)))


def short(text: str) -> str:
    """As much of a text as fits into a call's trailing metadata."""
    data = text.encode("utf-8", "replace")
    if len(data) <= MAX_TEXT_LEN:
        return text
    return data[: MAX_TEXT_LEN - 3].decode("utf-8", "ignore") + "…"


def rich_status(error: HeadraceError) -> status_pb2.Status:
    """The error as google.rpc has it, with all that is known of it."""
    code = errors.status_of(error).grpc_code
    status = status_pb2.Status(code=code, message=short(error.message))
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def _details(error: HeadraceError) -> Iterable[Message]:
    info = error_details_pb2.ErrorInfo(reason=_REASONS[type(error)], domain=DOMAIN)
    if isinstance(error, Internal):
        info.metadata["incident"] = error.incident
    if isinstance(error, NotFound) and error.field:
        info.metadata["field"] = short(error.field)
    yield info
    if isinstance(error, InvalidArgument) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=short(error.field), description=short(error.message)
        )
        yield error_details_pb2.BadRequest(field_violations=[violation])
    if isinstance(error, ResourceExhausted):
        quota = error_details_pb2.QuotaFailure.Violation(
            subject=short(error.field or DOMAIN), description=short(error.message)
        )
        yield error_details_pb2.QuotaFailure(violations=[quota])
    if error.retry_after_ms:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        yield retry


def read_details(metadata: Iterable[tuple[str, str | bytes]] | None) -> tuple[str, int]:
    """The field at fault and the milliseconds after which to try again, out of a failed call's
    trailing metadata; "" and 0 where they are not said."""
    field, retry_after_ms = "", 0
    for key, value in metadata or ():
        if key == PUSHBACK_KEY:
            text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
            retry_after_ms = retry_after_ms or (int(text) if text.isdecimal() else 0)
        elif key == DETAILS_KEY and isinstance(value, bytes):
            in_field, in_ms = _read_status(value)
            field, retry_after_ms = field or in_field, in_ms or retry_after_ms
    return field, retry_after_ms


def _read_status(data: bytes) -> tuple[str, int]:
    field, retry_after_ms = "", 0
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    try:
        for detail in status_pb2.Status.FromString(data).details:
            if detail.Unpack(bad) and bad.field_violations:
                field = bad.field_violations[0].field
            elif detail.Unpack(info):
                field = field or info.metadata.get("field", "")
            elif detail.Unpack(retry):
                retry_after_ms = max(0, retry.retry_delay.ToMilliseconds())
    except DecodeError:
        # Somebody else's details: the status itself stands.
        return "", 0
    return field, retry_after_ms
