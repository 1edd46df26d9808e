"""The sessions with all workers: opened when a sequence first goes there, closed when idle."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from headrace.rpc.options import CHANNEL
from headrace.v1.worker_pb2_grpc import WorkerServiceStub
from services.gateway.fleet import Worker
from services.gateway.worker_stream import StreamLimits, WorkerStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.gateway.submission import Listener, Submission

log = logging.getLogger("headrace.gateway")


@dataclass(frozen=True, slots=True)
class Ticket:
    """One sequence on one worker."""

    worker: Worker
    stream: WorkerStream
    slot: int

    def cancel(self, *, listen: bool = False) -> None:
        """Stop it there. The listener hears nothing more, unless it wants to `listen`."""
        self.stream.cancel(self.slot, listen=listen)


class WorkerPool:
    """One session per worker. Use it inside the loop, and `close` it at the end.

    `on_dead(worker, reason)` is called when a worker seems to be gone, after its
    sequences were told.
    """

    def __init__(
        self, *, gateway_id: str, limits: StreamLimits, on_dead: Callable[[Worker, str], None]
    ) -> None:
        self._gateway_id = gateway_id
        self._limits = limits
        self._on_dead = on_dead
        self._streams: dict[tuple[str, str], WorkerStream] = {}
        self._channels: dict[WorkerStream, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def submit(self, worker: Worker, submission: Submission, listener: Listener) -> Ticket:
        """Send a sequence to `worker`. Raises Unavailable or ResourceExhausted."""
        stream = self._stream(worker)
        return Ticket(worker, stream, stream.submit(submission, listener))

    async def close(self) -> None:
        """End all sessions; sequences still on them are lost."""
        await asyncio.gather(*(stream.close() for stream in list(self._channels)))
        await asyncio.gather(*self._closing)

    def _stream(self, worker: Worker) -> WorkerStream:
        key = (worker.worker_id, worker.address)
        stream = self._streams.get(key)
        if stream is None or stream.is_over:
            channel = grpc.aio.insecure_channel(worker.address, options=CHANNEL)
            stream = self._streams[key] = WorkerStream(
                worker,
                WorkerServiceStub(channel).Attach,
                gateway_id=self._gateway_id,
                limits=self._limits,
                on_over=self._forget,
            )
            self._channels[stream] = channel
        return stream

    def _forget(self, stream: WorkerStream, reason: str, died: bool) -> None:
        key = (stream.worker.worker_id, stream.worker.address)
        if self._streams.get(key) is stream:
            del self._streams[key]
        task = asyncio.create_task(self._channels.pop(stream).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        if died:
            log.warning("worker %s is dead: %s", stream.worker.worker_id, reason)
            self._on_dead(stream.worker, reason)
