"""Traces: one per request, through the real OpenTelemetry SDK, or nothing at all.

`setup` installs the SDK and its OTLP/gRPC exporter when
`OTEL_EXPORTER_OTLP_ENDPOINT` (or `…_TRACES_ENDPOINT`) is set; the standard
`OTEL_*` variables apply. Otherwise `enabled` stays False, `start_span` returns a
span that records nothing, and no SDK module is loaded.

Between our services the context travels as a `traceparent` string in the
request's own message, since one stream carries many requests.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.context import Context
    from opentelemetry.util.types import AttributeValue

__all__ = [
    "Span",
    "SpanKind",
    "end_with_error",
    "is_enabled",
    "setup",
    "shutdown",
    "start_span",
    "traceparent",
]

_propagator = TraceContextTextMapPropagator()
_tracer: trace.Tracer | None = None

#: Spans are dropped rather than waited for beyond this.
_EXPORT_TIMEOUT_S = 2
_SHUTDOWN_TIMEOUT_MS = 2000


def setup(service: str, instance: str) -> None:
    """Start exporting, if an endpoint is configured. Once per process, after any fork."""
    global _tracer
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get(
        "OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    if not endpoint:
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # The exporter's thread would hold the interpreter for 5 ms at a time.
    sys.setswitchinterval(0.0005)
    resource = Resource.create(
        {"service.name": f"headrace-{service}", "service.instance.id": instance}
    )
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    _tracer = provider.get_tracer("headrace")


def shutdown() -> None:
    """Export what waits, for two seconds at most."""
    global _tracer
    if _tracer is None:
        return
    from opentelemetry.sdk.trace import TracerProvider

    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.force_flush(_SHUTDOWN_TIMEOUT_MS)
        provider.shutdown()
    _tracer = None


def is_enabled() -> bool:
    """Whether spans go anywhere. Per-token and per-step code asks this first."""
    return _tracer is not None


def start_span(
    name: str,
    parent: str | Span = "",
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
    start_ns: int | None = None,
) -> Span:
    """Start a span below `parent` (a span here, or another process's traceparent).

    The caller ends it. `start_ns` is Unix time, for stages that are reported
    after the fact.
    """
    if _tracer is None:
        return INVALID_SPAN
    context: Context | None
    if isinstance(parent, str):
        context = _propagator.extract({"traceparent": parent}) if parent else None
    else:
        context = trace.set_span_in_context(parent)
    return _tracer.start_span(
        name, context=context, kind=kind, attributes=attributes, start_time=start_ns
    )


def traceparent(span: Span) -> str:
    """The W3C trace context of `span` for another process; empty when not recording."""
    if _tracer is None:
        return ""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def end_with_error(span: Span, error: BaseException | str) -> None:
    """End `span` as failed. The text must hold no prompt and no secret."""
    span.set_status(Status(StatusCode.ERROR, str(error)))
    span.end()
