"""The requests of one call: begun, followed to their end, and stopped with it.

A stream may carry many requests at once. When as many run as one stream may have, the
next is not read: the client waits, in its own flow control. A request that fails ends
alone, with its error in band.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from headrace import telemetry
from headrace.errors import InvalidArgument, ResourceExhausted
from headrace.rpc.errors import from_exception
from headrace.service import cancel_and_wait
from services.gateway import tracing
from services.gateway.ids import new_request_id
from services.gateway.kserve import answer, options
from services.gateway.kserve.convert import request_from_proto
from services.gateway.kserve.sink import InferSink, Outbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from headrace.errors import HeadraceError
    from headrace.kserve import inference_pb2 as pb
    from headrace.telemetry import Span
    from services.gateway.generation import Pipeline
    from services.gateway.kserve.convert import InferResponse

log = logging.getLogger("headrace.gateway.kserve")

#: Requests at once on one stream.
MAX_IN_FLIGHT = 256
#: What the pipeline's fields are called here.
_FIELDS = {"prompt": options.TEXT_INPUT, "token_ids": options.INPUT_IDS}


class Call:
    """One call's requests. `error` is why the whole call ends, if its client does not read.

    `close` it whatever happens: no engine may go on for a client that is gone.
    """

    def __init__(self, pipeline: Pipeline, max_len: int, traceparent: str = "") -> None:
        self.error: HeadraceError | None = None
        self.outbox = Outbox(max_len, self._overflow)
        self._pipeline = pipeline
        self._max_len = max_len
        self._traceparent = traceparent
        self._live: dict[InferSink, Span] = {}
        self._starts: set[asyncio.Task[None]] = set()
        self._failed: list[tuple[InferResponse, HeadraceError]] = []
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._reader: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        """The client has asked all it will and has all its answers, or the call failed."""
        if self.error is not None:
            return True
        read = self._reader is None or self._reader.done()
        return read and not self._live and not self._failed

    def read(
        self, requests: AsyncIterator[pb.ModelInferRequest], time_left: Callable[[], float | None]
    ) -> None:
        """Begin whatever comes on a stream."""
        self._reader = asyncio.create_task(self._read(requests, time_left), name="kserve reader")
        # The handler's wait ends when nothing more is asked.
        self._reader.add_done_callback(lambda _: self.outbox.wake())

    async def infer(self, proto: pb.ModelInferRequest, time_left_s: float | None) -> InferSink:
        """Begin one request and wait for its end. Raises HeadraceError if it is refused."""
        sink = self._parse(proto, time_left_s)
        if sink.request.stream:
            raise InvalidArgument("stream must be false: use ModelStreamInfer", field="stream")
        await self._start(sink)
        while not sink.is_over:
            await self.outbox.wait()
            self.outbox.take()
        self._finish(sink)
        return sink

    def take(self) -> list[tuple[InferResponse, HeadraceError | None]]:
        """What the client of a stream gets now."""
        taken: list[tuple[InferResponse, HeadraceError | None]] = [*self._failed]
        self._failed.clear()
        for sink in self.outbox.take():
            if sink not in self._live:
                continue
            is_over = sink.is_over
            if sink.error is not None:
                error = _ours(sink.error)
                taken.append((_failure(sink), error))
            else:
                taken += [(response, None) for response in answer.responses_of(sink)]
            if is_over:
                self._finish(sink)
        return taken

    async def close(self) -> None:
        """Stop whatever still runs."""
        self._stop()
        await cancel_and_wait(self._reader, *self._starts)

    async def _read(
        self, requests: AsyncIterator[pb.ModelInferRequest], time_left: Callable[[], float | None]
    ) -> None:
        async for proto in requests:
            try:
                sink = self._parse(proto, time_left())
            except Exception as error:  # noqa: BLE001 - the client hears of every failure
                self._fail(answer.failure_of(proto.model_name, proto.id), from_exception(error))
            else:
                task = asyncio.create_task(self._start_in_band(sink), name="kserve request")
                self._starts.add(task)
                task.add_done_callback(self._starts.discard)
            await self._has_room.wait()

    def _parse(self, proto: pb.ModelInferRequest, time_left_s: float | None) -> InferSink:
        parsed = options.parse(request_from_proto(proto), new_request_id(), time_left_s)
        sink = InferSink(parsed, self.outbox)
        span = tracing.request_span(traceparent=self._traceparent)
        if telemetry.is_enabled():
            tracing.describe(span, parsed.generation)
        self._live[sink] = span
        if len(self._live) + len(self._failed) >= MAX_IN_FLIGHT:
            self._has_room.clear()
        return sink

    async def _start(self, sink: InferSink) -> None:
        """Raises HeadraceError if the pipeline refuses it."""
        try:
            sink.generation = await self._pipeline.start(
                sink.request.generation, sink, self._live[sink]
            )
        except Exception as error:
            ours = _ours(from_exception(error))
            self._finish(sink, ours)
            raise ours from error

    async def _start_in_band(self, sink: InferSink) -> None:
        try:
            await self._start(sink)
        except Exception as error:  # noqa: BLE001 - the client hears of every failure
            self._fail(_failure(sink), from_exception(error))

    def _fail(self, response: InferResponse, error: HeadraceError) -> None:
        self._failed.append((response, error))
        if len(self._live) + len(self._failed) >= MAX_IN_FLIGHT:
            self._has_room.clear()
        self.outbox.wake()

    def _finish(self, sink: InferSink, error: HeadraceError | None = None) -> None:
        span = self._live.pop(sink, None)
        if span is not None:
            tracing.finish(span, sink.usage or error or sink.error or asyncio.CancelledError())
        if len(self._live) < MAX_IN_FLIGHT:
            self._has_room.set()

    def _stop(self) -> None:
        for task in (self._reader, *self._starts):
            if task is not None:
                task.cancel()
        for sink in list(self._live):
            if sink.generation is not None:
                sink.generation.cancel()
            self._finish(sink)

    def _overflow(self) -> None:
        self.error = ResourceExhausted(
            f"the client reads too slowly: more than {self._max_len} bytes wait for it"
        )
        log.warning("a call is cut: %s", self.error)
        self._stop()


def _failure(sink: InferSink) -> InferResponse:
    return answer.failure_of(sink.request.generation.model, sink.request.id)


def _ours(error: HeadraceError) -> HeadraceError:
    """The pipeline's error in this protocol's names."""
    if isinstance(error, InvalidArgument) and error.field in _FIELDS:
        name = _FIELDS[error.field]
        return InvalidArgument(f"input {name!r}: {error.message}", field=name)
    return error
