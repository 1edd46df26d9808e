"""Between protos and the worker's own types. No decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from headrace.rpc.convert import sampling_from_proto
from headrace.rpc.errors import to_proto
from headrace.v1 import types_pb2, worker_pb2
from services.worker.admission import Submission

if TYPE_CHECKING:
    from services.worker.dispatch import End
    from services.worker.engine import EngineStats
    from services.worker.single import Output

_REASONS = {
    "stop": types_pb2.FINISH_REASON_STOP,
    "length": types_pb2.FINISH_REASON_LENGTH,
    "cancelled": types_pb2.FINISH_REASON_CANCELLED,
    "error": types_pb2.FINISH_REASON_ERROR,
}


class Identity(NamedTuple):
    """One process of one worker."""

    worker_id: str
    generation: int
    address: str


class Pulse(NamedTuple):
    """The step that runs, and since when; 0 ms when the engine is idle."""

    step: int
    step_elapsed_ms: int


def submission(message: worker_pb2.Submission) -> Submission:
    """What a gateway submitted, not validated."""
    return Submission(
        slot=message.slot,
        request_id=message.request_id,
        index=message.index,
        prompt_ids=message.prompt_ids,
        generated_ids=message.generated_ids,
        sampling=sampling_from_proto(message.sampling),
        namespace_key=message.namespace_key,
        traceparent=message.traceparent,
        tenant=message.tenant,
        priority=message.priority,
        timeout_ms=message.timeout_ms,
    )


def end(ended: End) -> worker_pb2.SequenceEnd:
    """The last of a sequence, for the wire."""
    return worker_pb2.SequenceEnd(
        slot=ended.slot,
        finish_reason=_REASONS[ended.reason],
        error=None if ended.error is None else to_proto(ended.error),
        usage=types_pb2.Usage(
            prompt_tokens=ended.prompt_tokens,
            completion_tokens=ended.completion_tokens,
            cached_tokens=ended.cached_tokens,
        ),
        timings=worker_pb2.StageTimings(
            queue_ms=ended.queue_ms, prefill_ms=ended.prefill_ms, decode_ms=ended.decode_ms
        ),
        stopped_by_token=ended.stopped_by_token,
    )


def sequence_output(output: Output) -> worker_pb2.GenerateSequenceResponse:
    """What one sequence brought."""
    scores = None
    if output.scores or output.prompt_scores:
        scores = worker_pb2.SequenceLogprobs(tokens=output.scores, prompt=output.prompt_scores)
    return worker_pb2.GenerateSequenceResponse(
        token_ids=output.tokens,
        end=None if output.end is None else end(output.end),
        logprobs=scores,
    )


def worker_ref(identity: Identity) -> types_pb2.WorkerRef:
    """Who a worker is."""
    return types_pb2.WorkerRef(
        worker_id=identity.worker_id,
        generation=identity.generation,
        address=identity.address,
    )


def heartbeat(pulse: Pulse) -> worker_pb2.Heartbeat:
    """That it lives."""
    return worker_pb2.Heartbeat(step=pulse.step, step_elapsed_ms=pulse.step_elapsed_ms)


def load(stats: EngineStats, *, draining: bool) -> worker_pb2.WorkerLoad:
    """The load, for routers."""
    return worker_pb2.WorkerLoad(
        active_sequences=stats.active_sequences,
        queued_sequences=stats.queued_sequences,
        queued_prefill_tokens=stats.queued_prefill_tokens,
        used_blocks=stats.used_blocks,
        total_blocks=stats.total_blocks,
        step_ms=stats.step_ms,
        prefill_steps=stats.prefill_steps,
        prefill_tokens=stats.prefill_tokens,
        prefill_squares=stats.prefill_squares,
        prefill_context=stats.prefill_context,
        decode_steps=stats.decode_steps,
        decode_sequences=stats.decode_sequences,
        decode_context=stats.decode_context,
        draining=draining,
    )
