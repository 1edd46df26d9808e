"""The request's span, the same at both edges.

An edge opens it with what the client sent and closes it with how the request
ended; the pipeline adds what it learns in between. Attribute names follow
OpenTelemetry's GenAI conventions where these have one. No prompt and no output
ever becomes an attribute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace import telemetry
from headrace.errors import HeadraceError, status_of
from headrace.telemetry import SpanKind

if TYPE_CHECKING:
    from headrace.telemetry import Span
    from services.gateway.generation import GenerationRequest, Usage

#: The name of the span at either edge.
REQUEST_SPAN = "headrace.generate"
FIRST_TOKEN_EVENT = "first_token"


def request_span(name: str = REQUEST_SPAN, traceparent: str = "") -> Span:
    """Start the span of one client request below the client's own `traceparent`, if any."""
    return telemetry.start_span(name, traceparent, kind=SpanKind.SERVER)


def describe(span: Span, request: GenerationRequest) -> None:
    """Note what is asked. Call it only while telemetry is enabled."""
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": "chat" if request.messages is not None else "text_completion",
        "gen_ai.request.model": request.model,
        "gen_ai.request.temperature": request.sampling.temperature,
        "headrace.request_id": request.request_id,
        "headrace.num_sequences": request.n,
    }
    if request.sampling.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = request.sampling.max_tokens
    span.set_attributes(attributes)


def finish(span: Span, outcome: Usage | BaseException) -> None:
    """End the request's span: with its usage, or with the error that the client got."""
    if not telemetry.is_enabled():
        return
    if isinstance(outcome, HeadraceError):
        span.set_attribute("error.type", type(outcome).__name__)
        span.set_attribute("rpc.grpc.status_code", status_of(outcome).grpc_code)
        telemetry.end_with_error(span, outcome)
    elif isinstance(outcome, BaseException):
        span.set_attribute("error.type", type(outcome).__name__)
        telemetry.end_with_error(span, type(outcome).__name__)
    else:
        span.set_attributes(
            {
                "gen_ai.usage.input_tokens": outcome.prompt_tokens,
                "gen_ai.usage.output_tokens": outcome.completion_tokens,
                "headrace.cached_tokens": outcome.cached_tokens,
            }
        )
        span.end()
