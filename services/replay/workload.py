"""What a replay is fed: requests with their times, lengths and shared content.

A trace tells no text, only which pieces of prompts are equal: `hash_ids[i]` names
the prompt's i-th piece of `block_size` tokens. It knows no file format (`traces/`)
and no worker.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace. Two prompts are equal up to the first hash id that differs.

    Pieces beyond `hash_ids`, and all of a trace of `block_size` 0, are the request's own.
    """

    #: After the trace's start.
    arrival_ms: float
    #: Of the prompt.
    num_tokens: int
    #: Generated exactly.
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    session_id: str = ""
    tenant: str = ""
    priority: int = 0
    #: Deadline after the arrival, by which policy and scheduler order; 0: none.
    timeout_ms: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival."""

    requests: tuple[TraceRequest, ...]
    #: Tokens that a hash id stands for; 0: the trace tells of no shared content.
    block_size: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 0:
            raise InvalidArgument(
                f"block_size must be 0 or more, not {self.block_size}", field="block_size"
            )
        last = 0.0
        for number, request in enumerate(self.requests, 1):
            if not last <= request.arrival_ms < float("inf"):
                raise InvalidArgument(
                    f"request {number}: arrival_ms must be at least {last:g}, that of the request "
                    f"before it, not {request.arrival_ms:g}",
                    field="arrival_ms",
                )
            last = request.arrival_ms
            for field in ("num_tokens", "output_tokens"):
                if getattr(request, field) < 1:
                    raise InvalidArgument(
                        f"request {number}: {field} must be 1 or more, "
                        f"not {getattr(request, field)}",
                        field=field,
                    )
