"""Sequences and sampling parameters as protos, and back. Nothing else."""

from __future__ import annotations

from headrace.errors import Internal
from headrace.params import SamplingParams
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
        sampling=sampling_proto(submission.sampling),
        namespace_key=submission.namespace_key,
        traceparent=submission.traceparent,
        tenant=submission.tenant,
        priority=submission.priority,
        timeout_ms=max(1, int(submission.timeout_s * 1000)),
        hand_off=submission.hand_off,
    )


def sampling_proto(params: SamplingParams) -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
    )


def sampling_of(proto: types_pb2.SamplingParams) -> SamplingParams:
    """Absent fields take their defaults. Not validated."""
    defaults = SamplingParams()
    return SamplingParams(
        temperature=_exact(proto.temperature)
        if proto.HasField("temperature")
        else defaults.temperature,
        top_p=_exact(proto.top_p) if proto.HasField("top_p") else defaults.top_p,
        top_k=proto.top_k if proto.HasField("top_k") else defaults.top_k,
        min_p=_exact(proto.min_p) if proto.HasField("min_p") else defaults.min_p,
        seed=proto.seed if proto.HasField("seed") else None,
        max_tokens=proto.max_tokens if proto.HasField("max_tokens") else None,
        stop_token_ids=tuple(proto.stop_token_ids),
        ignore_eos=proto.ignore_eos,
    )


def end_of(proto: worker_pb2.SequenceEnd) -> End:
    """How a worker says that a sequence ended. A reason unknown here is an error."""
    reason = _REASONS.get(proto.finish_reason, "error")
    if reason != "error":
        return End(reason, proto.usage.cached_tokens)
    error = from_proto(proto.error) if proto.HasField("error") else Internal()
    return End(reason, proto.usage.cached_tokens, error)


def _exact(value: float) -> float:
    """The decimal that a client meant: 0.7 travels as the float 0.699999988."""
    return float(f"{value:.7g}")
