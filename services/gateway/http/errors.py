"""Errors as OpenAI words them: `{"error": {"message", "type", "param", "code"}}`.

`Problem` is what any failure becomes on this edge; faults that only HTTP knows
(no such route, a body too long) are raised as `HttpError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from headrace.errors import HeadraceError, NotFound, status_of

if TYPE_CHECKING:
    from collections.abc import Mapping

JSON = "application/json"
REQUEST_ID_HEADER = "X-Request-Id"

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Problem:
    """A failure as the client sees it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_ms: int = 0


class HttpError(Exception):
    """A failure that only this edge knows. `headers` go with the answer."""

    def __init__(
        self,
        problem: Problem,
        *,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(problem.message)
        self.problem = problem
        self.headers = headers or {}
        self.close = close


def problem_of(error: HeadraceError) -> Problem:
    """What `error` becomes on this edge."""
    status = status_of(error)
    param, code = error.field or None, None
    if isinstance(error, NotFound):
        # The only thing that a request can name in vain.
        param, code = param or "model", "model_not_found"
    return Problem(
        status.http_status, error.message, status.openai_type, param, code, error.retry_after_ms
    )


def error_body(problem: Problem) -> bytes:
    """The JSON of `problem`."""
    return _encode(
        {
            "error": {
                "message": problem.message,
                "type": problem.type,
                "param": problem.param,
                "code": problem.code,
            }
        }
    )


def error_response(problem: Problem, request_id: str) -> web.Response:
    """The answer to a request that failed before its first byte."""
    headers = {REQUEST_ID_HEADER: request_id}
    if problem.retry_after_ms:
        # The standard's unit is the second; OpenAI's clients read the finer one too.
        headers["Retry-After"] = str(-(-problem.retry_after_ms // 1000))
        headers["Retry-After-Ms"] = str(problem.retry_after_ms)
    return web.Response(
        status=problem.status, body=error_body(problem), content_type=JSON, headers=headers
    )


def body_too_long(length: int, limit: int, *, at_least: bool = False) -> HttpError:
    """A body of `length` bytes (or more), which is over the limit."""
    more = "at least " if at_least else ""
    problem = Problem(
        413, f"the body has {more}{length} bytes, the limit is {limit}", code="body_too_long"
    )
    return HttpError(problem, close=True)


def from_http_exception(error: web.HTTPException, request: web.Request) -> HttpError:
    """The router's own answers: no such route, no such method."""
    headers = {}
    message, code = f"{error.status} {error.reason}", None
    if isinstance(error, web.HTTPNotFound):
        message, code = f"there is no {request.method} {request.path}", "unknown_url"
    elif isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.path} takes {allowed}, not {request.method}"
        code, headers = "method_not_allowed", {"Allow": allowed}
    return HttpError(Problem(error.status, message, code=code), headers=headers)
