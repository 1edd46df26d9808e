"""Whether a submission may enter the engine: pure decisions over what the engine can.

It validates what the gateway sent once more (a gateway may be older, or a
person's script), in the worker's terms. It knows no stream and no queue, only
their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from headrace.blocks import ID_LEN, TOKEN_LEN, unpack_tokens
from headrace.errors import InvalidArgument, ResourceExhausted, Unavailable
from headrace.params import SamplingParams

if TYPE_CHECKING:
    from services.worker.engine import EngineInfo

#: Parameters that every engine has: the gateway always sets them.
_ALWAYS_SUPPORTED = frozenset({"seed", "max_tokens"})
_DEFAULTS = SamplingParams()
_RETRY_AFTER_MS = 200


@dataclass(frozen=True, slots=True)
class Submission:
    """A sequence that a gateway wants generated. Ids are packed, see headrace.blocks."""

    slot: int
    request_id: str
    index: int
    prompt_ids: bytes
    generated_ids: bytes
    sampling: SamplingParams
    namespace_key: bytes
    traceparent: str = ""
    tenant: str = ""
    priority: int = 0
    timeout_ms: int = 0

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids) // TOKEN_LEN

    @property
    def generated_len(self) -> int:
        """Tokens generated before it came here."""
        return len(self.generated_ids) // TOKEN_LEN


def check_capacity(num_live: int, info: EngineInfo, max_queued: int, *, draining: bool) -> None:
    """Whether one more sequence may come beside `num_live`.

    Raises Unavailable or ResourceExhausted.
    """
    if draining:
        raise Unavailable("this worker is draining; another serves the model")
    limit = info.max_sequences + max_queued
    if num_live >= limit:
        raise ResourceExhausted(
            f"{num_live} sequences run and wait on this worker already (limit {limit})",
            retry_after_ms=_RETRY_AFTER_MS,
        )


def check(submission: Submission, info: EngineInfo) -> Submission:
    """The submission as the engine takes it: max_tokens within what the context leaves.

    Raises InvalidArgument naming field, limit and value.
    """
    _check_ids(submission, info)
    sampling = submission.sampling.validate()
    _check_supported(sampling, info)
    sampling.check_vocabulary(info.vocab_size)
    if sampling.seed is None or sampling.max_tokens is None:
        field = "seed" if sampling.seed is None else "max_tokens"
        raise InvalidArgument(f"{field} must be set in a submission", field=field)
    room = info.context_len - submission.prompt_len
    if room < 1:
        raise InvalidArgument(
            f"the prompt has {submission.prompt_len} tokens; the context of {info.context_len} "
            f"leaves room for {info.context_len - 1} and one to generate",
            field="prompt",
        )
    if sampling.max_tokens <= room:
        return submission
    return replace(submission, sampling=replace(sampling, max_tokens=room))


def _check_ids(submission: Submission, info: EngineInfo) -> None:
    if len(submission.namespace_key) != ID_LEN:
        raise InvalidArgument(
            f"namespace_key must have {ID_LEN} bytes, not {len(submission.namespace_key)}",
            field="namespace_key",
        )
    if not submission.prompt_ids:
        raise InvalidArgument("the prompt must have at least one token", field="prompt")
    for field, packed in (
        ("prompt_ids", submission.prompt_ids),
        ("generated_ids", submission.generated_ids),
    ):
        if len(packed) % TOKEN_LEN:
            raise InvalidArgument(
                f"{field} must hold {TOKEN_LEN} bytes a token, not {len(packed)} in all",
                field=field,
            )
        largest = max(unpack_tokens(packed), default=0)
        if largest >= info.vocab_size:
            raise InvalidArgument(
                f"token id {largest} is outside the vocabulary of {info.vocab_size}", field=field
            )


def _check_supported(sampling: SamplingParams, info: EngineInfo) -> None:
    for field in fields(sampling):
        name = field.name
        if name in _ALWAYS_SUPPORTED or name in info.sampling:
            continue
        if getattr(sampling, name) != getattr(_DEFAULTS, name):
            raise InvalidArgument(
                f"{name} is not supported by the engine {info.engine}; "
                f"leave it at {getattr(_DEFAULTS, name)}",
                field=name,
            )
