"""Our errors on the wire, and back."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import grpc

from headrace import errors
from headrace.errors import HeadraceError, Internal
from headrace.v1 import types_pb2

log = logging.getLogger("headrace.rpc")

_GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}


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
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return errors.Unavailable(f"{peer} does not answer: {error.details()}")
    return errors.from_code(code, error.details() or error.code().name)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """End a unary or per-request call with `error`. Raises, always.

    When to try again goes into gRPC's own trailer for it.
    """
    ours = from_exception(error)
    trailers: tuple[tuple[str, str], ...] = ()
    if ours.retry_after_ms:
        trailers = (("grpc-retry-pushback-ms", str(ours.retry_after_ms)),)
    code = _GRPC_CODES[errors.status_of(ours).grpc_code]
    await context.abort(code, ours.message, trailers)
    raise AssertionError("abort returned")
