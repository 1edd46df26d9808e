"""The router's health stream to each worker: does it answer, and how loaded is it?

One task per worker keeps `WorkerService.Watch` open. A stream that breaks, or
says nothing for `SILENCE_S`, takes the worker out at once, whatever its lease
says; the next message brings it back. It knows workers' messages, and nothing
of who chooses or why.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

import grpc

from headrace.rpc import options
from headrace.service import cancel_and_wait
from headrace.v1 import worker_pb2, worker_pb2_grpc
from services.router.fleet import ReportedLoad
from services.router.latency_model import Totals

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.router.fleet import Fleet, Worker

    _Stream = grpc.aio.UnaryStreamCall[worker_pb2.WatchRequest, worker_pb2.WatchResponse]

log = logging.getLogger("headrace.router")

#: A worker says something twice a second; this much silence means that it hangs.
SILENCE_S = 3.0
_RECONNECT_S = 0.2


class Watchers:
    """A watch on every worker of the fleet. `close` before the loop ends.

    `on_generation` is called when a worker speaks as a newer generation than the
    fleet knows: ownership should look.
    """

    def __init__(self, fleet: Fleet, on_generation: Callable[[], None]) -> None:
        self._fleet = fleet
        self._on_generation = on_generation
        self._watches: dict[tuple[str, str], _Watch] = {}
        self._closing: set[asyncio.Task[None]] = set()
        fleet.on_join.append(self._join)
        fleet.on_leave.append(self._leave)

    async def close(self) -> None:
        """End all watches."""
        for watch in self._watches.values():
            watch.stop()
        tasks = [watch.task for watch in self._watches.values()]
        self._watches.clear()
        await cancel_and_wait(*tasks, *self._closing)

    def _join(self, model: str, worker: Worker) -> None:
        key = (model, worker.key.worker_id)
        if key not in self._watches:
            self._watches[key] = _Watch(self._fleet, model, worker, self._on_generation)

    def _leave(self, model: str, worker: Worker) -> None:
        key = (model, worker.key.worker_id)
        successor = self._fleet.worker(*key)
        if successor is not None and successor.card.address == worker.card.address:
            return  # The same stream tells of both.
        watch = self._watches.pop(key, None)
        if watch is not None:
            watch.stop()
            self._closing.add(watch.task)
            watch.task.add_done_callback(self._closing.discard)


class _Watch:
    def __init__(
        self, fleet: Fleet, model: str, worker: Worker, on_generation: Callable[[], None]
    ) -> None:
        self._fleet = fleet
        self._model = model
        self._worker_id = worker.key.worker_id
        self._address = worker.card.address
        self._on_generation = on_generation
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self.task: asyncio.Task[None] = asyncio.create_task(
            self._run(), name=f"watch {self._worker_id}"
        )

    def stop(self) -> None:
        self.task.cancel()

    async def _run(self) -> None:
        async with grpc.aio.insecure_channel(self._address, options=options.CHANNEL) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            while True:
                try:
                    reason = await self._listen(stub)
                except grpc.aio.AioRpcError as error:
                    reason = f"its health stream broke: {error.code().name}"
                except Exception as error:
                    # Whatever it is, the watch must go on, or the worker is lost for ever.
                    log.exception("watch on %s failed", self._worker_id)
                    reason = f"its health stream failed: {type(error).__name__}"
                self._fleet.unreachable(self._model, self._worker_id, reason)
                await asyncio.sleep(_RECONNECT_S)

    async def _listen(self, stub: worker_pb2_grpc.WorkerServiceStub) -> str:
        """Follow one stream. Returns why it ended, or raises what broke it."""
        stream = cast("_Stream", stub.Watch(worker_pb2.WatchRequest()))
        self._heard_at = self._loop.time()
        self._check_silence(stream)
        try:
            while True:
                message = await stream.read()
                if message is grpc.aio.EOF:
                    return "it closed its health stream"
                self._heard_at = self._loop.time()
                self._hear(cast("worker_pb2.WatchResponse", message))
        except asyncio.CancelledError:
            # Raised for the stream cancelled on silence, and for this task's own end.
            if cast("asyncio.Task[None]", asyncio.current_task()).cancelling():
                raise
            return f"it said nothing for {SILENCE_S:g} s"
        finally:
            self._silence.cancel()
            stream.cancel()

    def _check_silence(self, stream: _Stream) -> None:
        """A timer of its own, moved on only when it fires: messages stay cheap."""
        left = self._heard_at + SILENCE_S - self._loop.time()
        if left > 0:
            self._silence = self._loop.call_later(left, self._check_silence, stream)
        else:
            stream.cancel()

    def _hear(self, message: worker_pb2.WatchResponse) -> None:
        if message.worker.worker_id != self._worker_id:
            reason = f"worker {message.worker.worker_id!r} answers at its address {self._address}"
            self._fleet.unreachable(self._model, self._worker_id, reason)
            return
        worker = self._fleet.worker(self._model, self._worker_id)
        if worker is not None and message.worker.generation > worker.key.generation:
            self._on_generation()
        self._fleet.report(self._model, self._worker_id, _load(message.load))


def _load(load: worker_pb2.WorkerLoad) -> ReportedLoad:
    totals = Totals(
        step_ms=load.step_ms,
        prefill_steps=load.prefill_steps,
        prefill_tokens=load.prefill_tokens,
        prefill_squares=load.prefill_squares,
        prefill_context=load.prefill_context,
        decode_steps=load.decode_steps,
        decode_sequences=load.decode_sequences,
        decode_context=load.decode_context,
    )
    return ReportedLoad(
        active_sequences=load.active_sequences,
        queued_sequences=load.queued_sequences,
        queued_prefill_tokens=load.queued_prefill_tokens,
        used_blocks=load.used_blocks,
        total_blocks=load.total_blocks,
        draining=load.draining,
        totals=totals,
    )
