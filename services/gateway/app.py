"""The gateway put together: pipeline, both edges, health, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING

from aiohttp import web

from headrace import status
from headrace.config import split_address
from headrace.errors import StartupError
from headrace.kserve.inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from headrace.service import cancel_and_wait, settle_garbage
from headrace.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from services.gateway.connections import (
    ConnectionLimits,
    HttpConnections,
    affordable_connections,
    body_in_time,
    raise_file_limit,
)
from services.gateway.h2.server import EdgeServer
from services.gateway.http.app import create_app
from services.gateway.ids import new_gateway_id
from services.gateway.kserve import servicer as kserve
from services.gateway.pipeline import GatewayPipeline
from services.gateway.servicer import SERVICE_NAME, InferenceServicer

if TYPE_CHECKING:
    from services.gateway.config import GatewayConfig

log = logging.getLogger("headrace.gateway")

#: How often health follows readiness.
_HEALTH_S = 0.1
#: How long a gateway that shares its port waits for a worker before it listens.
_LISTEN_ANYWAY_S = 10.0
#: How long handlers have to write what is left when their requests are over.
_FLUSH_S = 5.0
#: How long requests on open connections are taken as before once no new ones are.
_LAST_CALL_S = 0.25


class Gateway:
    """One gateway. `start` it inside the loop; `stop` drains and ends it."""

    def __init__(self, config: GatewayConfig) -> None:
        self.gateway_id = config.gateway_id or new_gateway_id()
        self.http_port = 0
        self.grpc_port = 0
        self._config = config
        self.pipeline = GatewayPipeline(config, self.gateway_id)
        max_connections = affordable_connections(config.max_connections, raise_file_limit())
        self._server = EdgeServer(
            config.grpc,
            [SERVICE_NAME, kserve.SERVICE_NAME],
            reuse_port=config.reuse_port,
            max_connections=max_connections,
            max_age_s=config.connection_max_age_s,
            age_grace_s=config.connection_grace_s,
        )
        servicer = InferenceServicer(
            self.pipeline, max_client_buffer_len=config.max_client_buffer_len
        )
        add_InferenceServiceServicer_to_server(servicer, self._server.grpc_server)
        add_GRPCInferenceServiceServicer_to_server(
            kserve.KServeServicer(
                self.pipeline, max_client_buffer_len=config.max_client_buffer_len
            ),
            self._server.grpc_server,
        )
        app = create_app(
            self.pipeline,
            max_body_len=config.max_body_len,
            max_client_buffer_len=config.max_client_buffer_len,
        )
        app.middlewares.append(body_in_time(config.http_body_timeout_s))
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_FLUSH_S
        )
        self.connections = HttpConnections(
            self._runner,
            ConnectionLimits(
                max_connections=max_connections,
                max_age_s=config.connection_max_age_s,
                idle_s=config.http_idle_s,
                read_timeout_s=config.client_read_timeout_s,
            ),
        )
        if max_connections < config.max_connections:
            log.warning(
                "--max-connections is %d, not %d: raise the limit of open files (ulimit -n)",
                max_connections,
                config.max_connections,
            )
        self._health: asyncio.Task[None] | None = None
        self._is_listening = False

    async def start(self) -> None:
        """Serve both edges; healthy as soon as a request could be served. Raises StartupError."""
        self.pipeline.open()
        status.report("waiting for a worker")
        if self._config.reuse_port:
            await self._until_ready()
        self.grpc_port = await self._server.start()
        self.http_port = await self._start_http()
        self._is_listening = True
        self._health = asyncio.create_task(self._follow_readiness(), name="health")
        log.info("listening: http %d, grpc %d", self.http_port, self.grpc_port)

    async def stop(self) -> None:
        """Not ready at once; then what runs may end, in the configured time; then all stops.

        Alone on its port it refuses what still comes, with a reason; on a shared one it
        takes no more connections, and they go to the others.
        """
        config = self._config
        await cancel_and_wait(self._health)
        self.pipeline.leave()
        await self._server.set_serving(False)
        status.report("draining")
        if self._is_listening and config.drain_delay_s:
            await asyncio.sleep(config.drain_delay_s)
        leaving: asyncio.Task[None] | None = None
        if self._is_listening and config.reuse_port:
            self.connections.leave()
            leaving = asyncio.create_task(self._server.stop(config.drain_timeout_s + _FLUSH_S))
            # For what clients sent before they could know.
            await asyncio.sleep(min(_LAST_CALL_S, config.drain_timeout_s))
        await self.pipeline.drain(config.drain_timeout_s)
        self.connections.leave()
        await asyncio.gather(self._server.stop(_FLUSH_S), self._runner.cleanup())
        await cancel_and_wait(leaving)
        await self.pipeline.close()

    async def _until_ready(self) -> None:
        """Others may serve on this port what we could only refuse: let them, for a while."""
        for _ in range(int(_LISTEN_ANYWAY_S / _HEALTH_S)):
            if self.pipeline.is_ready():
                return
            await asyncio.sleep(_HEALTH_S)
        log.warning("listening although not ready: no worker in %g s", _LISTEN_ANYWAY_S)

    async def _start_http(self) -> int:
        host, port = split_address(self._config.http, what="--http")
        await self._runner.setup()
        try:
            return await self.connections.start(host, port, reuse_port=self._config.reuse_port)
        except OSError as error:
            cause = "the port is in use" if error.errno == errno.EADDRINUSE else str(error)
            raise StartupError(
                f"can't listen on {self._config.http}: {cause}; "
                "stop what listens there or choose another with --http"
            ) from error

    async def _follow_readiness(self) -> None:
        was_ready: bool | None = None
        while True:
            is_ready = self.pipeline.is_ready()
            if is_ready != was_ready:
                await self._server.set_serving(is_ready)
                status.report(status.READY if is_ready else "waiting for a worker")
                if is_ready:
                    names = ", ".join(model.name for model in self.pipeline.models())
                    log.info("ready: serving %s", names)
                elif was_ready:
                    log.warning("not ready: no model has both a tokenizer and a worker")
                was_ready = is_ready
            await asyncio.sleep(_HEALTH_S)


async def serve(config: GatewayConfig, stop: asyncio.Event) -> None:
    """Run a gateway until `stop` is set. Raises StartupError."""
    gateway = Gateway(config)
    try:
        await gateway.start()
        settle_garbage()
        await stop.wait()
    finally:
        await gateway.stop()
