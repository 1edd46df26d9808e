"""A sequence's part of its request's trace, made at its end from its stage timings.

    worker.generate ── queue · prefill · decode          (event: first_token)

Spans are made after the fact, with the times that the engine measured, so that
the token path carries nothing. Called only when tracing is on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from headrace import telemetry
from headrace.telemetry import SpanKind

if TYPE_CHECKING:
    from services.worker.admission import Submission
    from services.worker.dispatch import End

_NS_PER_MS = 1_000_000


def record(submission: Submission, end: End, started_ns: int, worker_id: str, engine: str) -> None:
    """Record one sequence that was submitted at `started_ns` (Unix time) and ends now."""
    span = telemetry.start_span(
        "worker.generate",
        submission.traceparent,
        kind=SpanKind.SERVER,
        start_ns=started_ns,
        attributes={
            "headrace.worker_id": worker_id,
            "headrace.engine": engine,
            "headrace.request_id": submission.request_id,
            "headrace.index": submission.index,
            "headrace.finish_reason": end.reason,
            "headrace.prompt_tokens": end.prompt_tokens,
            "headrace.cached_tokens": end.cached_tokens,
            "headrace.completion_tokens": end.completion_tokens,
            "headrace.resumed_tokens": submission.generated_len,
        },
    )
    start = started_ns
    for stage, duration_ms in (
        ("queue", end.queue_ms),
        ("prefill", end.prefill_ms),
        ("decode", end.decode_ms),
    ):
        if stage == "decode" and end.completion_tokens > submission.generated_len:
            span.add_event("first_token", timestamp=start)
        stop = start + int(duration_ms * _NS_PER_MS)
        telemetry.start_span(stage, span, start_ns=start).end(end_time=stop)
        start = stop
    end_ns = max(start, time.time_ns())
    if end.error is None:
        span.end(end_time=end_ns)
    else:
        telemetry.end_with_error(span, type(end.error).__name__)
