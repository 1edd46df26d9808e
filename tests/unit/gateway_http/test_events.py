"""The fast path of a stream writes what plain JSON would say."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.generation import Usage
from services.gateway.http.responses import (
    EventTemplate,
    ResponseHead,
    chat_events,
    completion_events,
)
from services.gateway.http.sse import StreamingSink, chunk_head

HEAD = ResponseHead('chatcmpl-"x"', 1700000000, "org/möd€l")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def _payload(event: bytes) -> Any:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert b"\r" not in event
    return json.loads(event[6:])


@given(text=TEXTS, index=st.integers(0, 2), include_usage=st.booleans())
def test_chat_event(text: str, index: int, include_usage: bool) -> None:
    template = chat_events(HEAD, n=3, include_usage=include_usage)
    expected = {
        "id": HEAD.id,
        "object": "chat.completion.chunk",
        "created": HEAD.created,
        "model": HEAD.model,
        "choices": [
            {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
        ],
    }
    assert _payload(template.text(index, text)) == expected | (
        {"usage": None} if include_usage else {}
    )


@given(text=TEXTS)
def test_completion_event(text: str) -> None:
    template = completion_events(HEAD, n=1, include_usage=False)
    assert _payload(template.text(0, text)) == {
        "id": HEAD.id,
        "object": "text_completion",
        "created": HEAD.created,
        "model": HEAD.model,
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}],
    }


class RecordingTransport(asyncio.Transport):
    """A transport without a network: the bytes are what is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: Any) -> None:
        self.data += bytes(data)

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


@pytest.mark.parametrize("events", [chat_events, completion_events])
@pytest.mark.parametrize("attach_after", [0, 1, 5])
async def test_fast_path_equals_plain_twin(events: Any, attach_after: int) -> None:
    """Held or attached, chunked or not: the same events in the same order."""
    template: EventTemplate = events(HEAD, n=2, include_usage=True)
    texts = ["a", "", "é\n\r\u2028😀", 'quote" \\', "x" * 5000, "\x00\x7f"]
    usage = Usage(3, 6, 0)
    plain = template.opening
    for text in texts:
        plain += b"".join(template.text(index, text) for index in (0, 1) if text)
    plain += template.end(0, "stop") + template.end(1, "length") + template.closing(usage)
    for chunked in (False, True):
        transport = RecordingTransport()
        sink = StreamingSink(template, asyncio.get_running_loop(), chunked=chunked)
        for number, text in enumerate(texts):
            if number == attach_after:
                sink.attach(transport)
            sink.on_delta(0, text, [number])
            sink.on_delta(1, text, [number])
        assert sink.started.done()
        sink.on_end(0, "stop")
        sink.on_end(1, "length")
        sink.on_done(usage)
        assert sink.done.done()
        assert (_unchunked(transport.data) if chunked else transport.data) == plain


class CountingLoop(asyncio.SelectorEventLoop):
    """A loop that counts what is asked of it."""

    num_calls = 0

    def create_future(self) -> asyncio.Future[Any]:
        self.num_calls += 1
        return super().create_future()

    def create_task(self, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
        self.num_calls += 1
        return super().create_task(coro, **kwargs)

    def call_soon(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return super().call_soon(*args, **kwargs)

    def call_at(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return super().call_at(*args, **kwargs)


@pytest.mark.parametrize("chunked", [True, False])
def test_no_asyncio_primitive_per_token(chunked: bool) -> None:
    """A future set, a task, a callback: all of them would ask the loop for something."""
    counts = []
    for num_tokens in (1, 1000):
        with asyncio.Runner(loop_factory=CountingLoop) as runner:
            counts.append(runner.run(_count_calls(num_tokens, chunked)))
    assert counts[0] == counts[1]


async def _count_calls(num_tokens: int, chunked: bool) -> int:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, CountingLoop)
    before = loop.num_calls
    template = chat_events(HEAD, n=1, include_usage=True)
    sink = StreamingSink(template, loop, chunked=chunked)
    sink.on_delta(0, "first", [0])
    await sink.started
    sink.attach(RecordingTransport())
    for number in range(num_tokens):
        sink.on_delta(0, "token", [number])
    sink.on_end(0, "stop")
    sink.on_done(Usage(1, 1, 0))
    await sink.done
    return loop.num_calls - before


def _unchunked(data: bytes) -> bytes:
    plain = b""
    while data:
        length, _, data = data.partition(b"\r\n")
        size = int(length, 16)
        assert chunk_head(size) == length + b"\r\n"
        assert data[size : size + 2] == b"\r\n"
        plain, data = plain + data[:size], data[size + 2 :]
    return plain
