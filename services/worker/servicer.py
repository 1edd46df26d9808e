"""The worker's RPCs: protos in, protos out, and nothing decided."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.errors import HeadraceError, Unavailable
from headrace.registry import pack_short_ids
from headrace.rpc.convert import model_card_to_proto
from headrace.rpc.errors import abort
from headrace.v1 import worker_pb2, worker_pb2_grpc
from services.worker import convert
from services.worker.attach import Connection
from services.worker.single import SingleSequence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from headrace.v1.worker_pb2_grpc import _MaybeAsyncIterator, _ServicerContext
    from services.worker.worker import Worker

SERVICE_NAME = "headrace.v1.WorkerService"

#: Block ids in one message of a dump: 64 KiB.
_DUMP_IDS = 8192


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Serves `worker` from when it is set; before, the engine is still loading."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    async def Attach(
        self,
        request_iterator: _MaybeAsyncIterator[worker_pb2.AttachRequest],
        context: _ServicerContext,
    ) -> AsyncIterator[worker_pb2.AttachResponse]:
        worker = await self._started(context)
        connection = Connection(worker.sessions, request_iterator)
        _when_done(context, connection.close)
        try:
            async for frame in connection.frames():
                yield frame
        except HeadraceError as error:
            await abort(context, error)

    async def Watch(
        self, request: worker_pb2.WatchRequest, context: _ServicerContext
    ) -> AsyncIterator[worker_pb2.WatchResponse]:
        worker = await self._started(context)
        async for _ in worker.changes():
            yield worker_pb2.WatchResponse(
                worker=convert.worker_ref(worker.identity()),
                heartbeat=convert.heartbeat(worker.pulse()),
                load=convert.load(worker.load(), draining=worker.sequences.draining),
            )

    async def GenerateSequence(
        self, request: worker_pb2.GenerateSequenceRequest, context: _ServicerContext
    ) -> AsyncIterator[worker_pb2.GenerateSequenceResponse]:
        worker = await self._started(context)
        sequence = SingleSequence(worker.sequences, convert.submission(request.submission))
        _when_done(context, sequence.close)
        async for output in sequence.outputs():
            yield convert.sequence_output(output)

    async def GetWorker(
        self, request: worker_pb2.GetWorkerRequest, context: _ServicerContext
    ) -> worker_pb2.GetWorkerResponse:
        worker = await self._started(context)
        return worker_pb2.GetWorkerResponse(
            worker=convert.worker_ref(worker.identity()),
            model=model_card_to_proto(worker.model),
            engine=worker.info.engine,
            load=convert.load(worker.load(), draining=worker.sequences.draining),
        )

    async def DumpBlocks(
        self, request: worker_pb2.DumpBlocksRequest, context: _ServicerContext
    ) -> AsyncIterator[worker_pb2.DumpBlocksResponse]:
        worker = await self._started(context)
        try:
            dump = await worker.dump_blocks()
        except HeadraceError as error:
            await abort(context, error)
        for start in range(0, len(dump.blocks), _DUMP_IDS):
            yield worker_pb2.DumpBlocksResponse(
                block_ids=pack_short_ids(dump.blocks[start : start + _DUMP_IDS])
            )
        yield worker_pb2.DumpBlocksResponse(sequence=dump.sequence, unpublished=dump.unpublished)

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: _ServicerContext
    ) -> worker_pb2.DrainResponse:
        worker = await self._started(context)
        await worker.drain()
        return worker_pb2.DrainResponse(active_sequences=len(worker.sequences))

    async def _started(self, context: _ServicerContext) -> Worker:
        if self.worker is None:
            await abort(
                context, Unavailable("this worker is loading its model", retry_after_ms=1000)
            )
        return self.worker


def _when_done(context: _ServicerContext, act: Callable[[], None]) -> None:
    """Have `act` called when the RPC is over, however it ends."""
    # types-grpcio declares a class where a callable is meant.
    context.add_done_callback(lambda _: act())  # type: ignore[arg-type]
