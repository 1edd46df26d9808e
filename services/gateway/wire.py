"""Sequences as protos, and back. Nothing else."""

from __future__ import annotations

from headrace.errors import Internal
from headrace.rpc.convert import sampling_to_proto
from headrace.rpc.errors import from_proto
from headrace.v1 import types_pb2, worker_pb2
from services.gateway.submission import End, Reason, Submission

_REASONS: dict[int, Reason] = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
    types_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


def submission_proto(submission: Submission, slot: int) -> worker_pb2.Submission:
    return worker_pb2.Submission(
        slot=slot,
        request_id=submission.request_id,
        index=submission.index,
        prompt_ids=submission.prompt_ids,
        generated_ids=submission.generated_ids,
        sampling=sampling_to_proto(submission.sampling),
        namespace_key=submission.namespace_key,
        traceparent=submission.traceparent,
        tenant=submission.tenant,
        priority=submission.priority,
        timeout_ms=max(1, int(submission.timeout_s * 1000)),
        hand_off=submission.hand_off,
    )


def end_of(proto: worker_pb2.SequenceEnd) -> End:
    """How a worker says that a sequence ended. A reason unknown here is an error."""
    reason = _REASONS.get(proto.finish_reason, "error")
    if reason != "error":
        return End(reason, proto.usage.cached_tokens)
    error = from_proto(proto.error) if proto.HasField("error") else Internal()
    return End(reason, proto.usage.cached_tokens, error)
