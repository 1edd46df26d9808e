"""The worker service, put together: bind, load, register, serve, drain.

It binds first, so that a port in use is known before a long load; health is
NOT_SERVING until the engine is loaded and Redis knows the worker.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from headrace import redis_servers, status
from headrace.models.store import resolve
from headrace.registry import redact
from headrace.rpc.server import Server, advertised
from headrace.service import cancel_and_wait, settle_garbage
from headrace.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
from services.worker.engine_client import EngineClient
from services.worker.servicer import SERVICE_NAME, WorkerServicer
from services.worker.worker import Place, Worker

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from services.worker.config import WorkerConfig

_SAY_AGAIN_S = 1.0

log = logging.getLogger("headrace.worker")


class EngineDied(Exception):
    """The engine's process is gone. The worker ends, and is started anew by others."""


async def run(config: WorkerConfig, stop: asyncio.Event) -> None:
    """Serve until `stop`. Raises StartupError, EngineDied."""
    status.report("starting")
    redis_servers.servers(config.redis)  # A bad URL is said before a long load.
    files = resolve(config.model)
    server = Server(config.listen, [SERVICE_NAME])
    servicer = WorkerServicer()
    add_WorkerServiceServicer_to_server(servicer, server.grpc_server)
    port = await server.start()
    address = advertised(config.listen, port, config.advertise)
    engine = EngineClient(config.engine, config.engine_config(files.name, str(files.path)))
    try:
        loading = asyncio.create_task(engine.start())
        await _first(loading, stop.wait())
        if not loading.done():
            await cancel_and_wait(loading)
            return
        place = Place(address, config.worker_id or address)
        worker = Worker(config, files, engine, await loading, place, server.set_serving)
        servicer.worker = worker
        try:
            await _serve(worker, config, server, stop)
        finally:
            await worker.close()
    finally:
        await server.stop()
        await engine.close()


async def _serve(worker: Worker, config: WorkerConfig, server: Server, stop: asyncio.Event) -> None:
    died = worker.engine.died
    worker.start()
    await _first(_registered(worker, redact(config.redis)), stop.wait(), died)
    if worker.publisher.registered.is_set():
        settle_garbage()
        await server.set_serving(True)
        status.report(status.READY)
        log.info("serving %s at %s", worker.model.name, worker.identity().address)
    await _first(stop.wait(), died)
    if not died.done():
        log.info("draining, %d sequences run", len(worker.sequences))
        await worker.drain()
        await _first(worker.finished(), asyncio.sleep(config.drain_timeout_s), died)
        log.info("stopping, %d sequences run", len(worker.sequences))
    if died.done():
        await server.set_serving(False)
        raise EngineDied(died.result())


async def _registered(worker: Worker, redis: str) -> None:
    """Return when Redis knows the worker; say meanwhile what is in the way."""
    while not worker.publisher.registered.is_set():
        trouble = worker.publisher.trouble
        status.report(f"waiting for Redis at {redis}" + (f": {trouble}" if trouble else ""))
        try:
            async with asyncio.timeout(_SAY_AGAIN_S):
                await worker.publisher.registered.wait()
        except TimeoutError:
            continue


async def _first(*waits: Coroutine[Any, Any, object] | asyncio.Future[Any]) -> None:
    """Return when one of `waits` is done. Coroutines that are not are cancelled."""
    own = [asyncio.ensure_future(wait) for wait in waits if asyncio.iscoroutine(wait)]
    given = [wait for wait in waits if asyncio.isfuture(wait)]
    try:
        await asyncio.wait([*own, *given], return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel_and_wait(*own)
