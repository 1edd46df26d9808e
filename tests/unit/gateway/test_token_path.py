"""What a token costs between a worker's frame and a client's sink: no asyncio, ever."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from typing import Any

import pytest
from opentelemetry.trace import INVALID_SPAN

from headrace.params import SamplingParams
from headrace.v1 import worker_pb2
from services.gateway.call_sink import CallSink
from services.gateway.generation import GenerationRequest
from services.gateway.ids import new_request_id

TOKENS_PER_FRAME = 64


class Call:
    """What a sink writes to, without a connection."""

    is_blocked = False

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def wait_for_room(self) -> None:
        raise AssertionError("there is room")


def calls_of(function: Any, *arguments: Any) -> Counter[str]:
    """How often `function` calls what, by module and name; C functions too."""
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls[f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"] += 1
        elif event == "c_call":
            calls[f"{argument.__module__}.{argument.__qualname__}"] += 1

    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("stop", [(), ("never",)])
async def test_no_asyncio_primitive_is_touched_per_token(mesh: Any, stop: tuple[str, ...]) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    worker.allowance = 0
    edges = [Call() for _ in range(TOKENS_PER_FRAME // 16)]
    for call in edges:
        sampling = SamplingParams(max_tokens=10_000)
        request = GenerationRequest(
            new_request_id(), "bytes", prompt="hello", n=16, stop=stop, sampling=sampling
        )
        sink = CallSink(request, call, 1 << 20)
        sink.generation = await mesh.pipeline.start(request, sink, INVALID_SPAN)
    await mesh.eventually(lambda: len(worker.submissions) == TOKENS_PER_FRAME)
    (stream,) = mesh.pipeline._workers._channels
    slots = sorted(submission.slot for submission in worker.submissions)

    def frame() -> Any:
        number = stream._received.last + 1
        token_ids = [97] * len(slots)
        return worker_pb2.AttachResponse(frame=number, slots=slots, token_ids=token_ids)

    stream._receive(frame())
    await asyncio.sleep(0)
    calls = calls_of(stream._receive, frame())
    per_token = {name: count for name, count in calls.items() if count >= TOKENS_PER_FRAME}
    assert any("on_tokens" in name for name in per_token)
    assert any("on_delta" in name for name in per_token)
    assert sum(len(call.sent) for call in edges) == 2 * TOKENS_PER_FRAME
    not_ours = ("asyncio", "concurrent", "contextvars", "uvloop", "_asyncio", "grpc")
    assert not [name for name in per_token if name.startswith(not_ours)]
    touched = sum(count for name, count in calls.items() if name.startswith(not_ours))
    assert touched <= 12, f"per frame at most a timer and a wake-up: {calls}"
    print("\n".join(f"{count:6} {name}" for name, count in calls.most_common()))
