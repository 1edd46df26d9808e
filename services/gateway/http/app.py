"""The HTTP edge put together: routes, request ids, and errors in OpenAI's form.

Serve it with `handler_cancellation=True`: a handler that only waits would never
learn otherwise that its client has gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from headrace.errors import HeadraceError
from headrace.rpc.errors import from_exception
from services.gateway.http.errors import (
    REQUEST_ID_HEADER,
    HttpError,
    Problem,
    error_response,
    from_http_exception,
    problem_of,
)
from services.gateway.http.handlers import REQUEST_ID, Handlers
from services.gateway.http.sse import DEFAULT_MAX_BUFFER_LEN
from services.gateway.ids import new_request_id
from services.gateway.modalities import MODALITIES, routes

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

    from services.gateway.generation import Pipeline


def create_app(
    pipeline: Pipeline,
    *,
    max_body_len: int,
    max_client_buffer_len: int = DEFAULT_MAX_BUFFER_LEN,
) -> web.Application:
    """The application over `pipeline`.

    A longer body is refused; a stream whose client leaves more than
    `max_client_buffer_len` bytes unread is cut. Both in bytes.
    """
    handlers = Handlers(
        pipeline, max_body_len=max_body_len, max_client_buffer_len=max_client_buffer_len
    )
    app = web.Application(middlewares=[answer_errors])
    router = app.router
    for modality in MODALITIES:
        app.add_routes(routes(modality, handlers))
    router.add_get("/v1/models", handlers.models)
    # Names may hold slashes: org/model.
    router.add_get("/v1/models/{id:.+}", handlers.model)
    router.add_get("/openapi.json", handlers.openapi)
    router.add_get("/health/live", handlers.live)
    router.add_get("/health/ready", handlers.ready)
    return app


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, and whatever goes wrong the form that clients parse."""
    request_id = request[REQUEST_ID] = new_request_id()
    try:
        response = await handler(request)
    except HttpError as error:
        response = _answer(error, request_id)
    except web.HTTPException as error:
        response = _answer(from_http_exception(error, request), request_id)
    except HeadraceError as error:
        response = error_response(problem_of(error), request_id)
    except ConnectionError:
        # The client went away while it was answered: this answer reaches nobody.
        return error_response(Problem(499, "the client went away"), request_id)
    except Exception as error:  # noqa: BLE001 - logged there, and an incident for the client
        response = error_response(problem_of(from_exception(error)), request_id)
    if not response.prepared:
        response.headers[REQUEST_ID_HEADER] = request_id
    return response


def _answer(error: HttpError, request_id: str) -> web.Response:
    response = error_response(error.problem, request_id)
    response.headers.update(error.headers)
    if error.close:
        response.force_close()
    return response
