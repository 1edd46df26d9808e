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
from headrace.rpc.options import EDGE_SERVER
from headrace.rpc.server import Server
from headrace.service import cancel_and_wait, settle_garbage
from headrace.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from services.gateway.http.app import create_app
from services.gateway.ids import new_gateway_id
from services.gateway.pipeline import GatewayPipeline
from services.gateway.servicer import SERVICE_NAME, InferenceServicer

if TYPE_CHECKING:
    from services.gateway.config import GatewayConfig

log = logging.getLogger("headrace.gateway")

#: How often health follows readiness.
_HEALTH_S = 0.1
#: How long handlers have to write what is left when their requests are over.
_FLUSH_S = 5.0
_KEEPALIVE_S = 75.0


class Gateway:
    """One gateway. `start` it inside the loop; `stop` drains and ends it."""

    def __init__(self, config: GatewayConfig) -> None:
        self.gateway_id = config.gateway_id or new_gateway_id()
        self.http_port = 0
        self.grpc_port = 0
        self._config = config
        self.pipeline = GatewayPipeline(config, self.gateway_id)
        self._server = Server(config.grpc, [SERVICE_NAME], settings=EDGE_SERVER)
        servicer = InferenceServicer(
            self.pipeline, max_client_buffer_len=config.max_client_buffer_len
        )
        add_InferenceServiceServicer_to_server(servicer, self._server.grpc_server)
        app = create_app(
            self.pipeline,
            max_body_len=config.max_body_len,
            max_client_buffer_len=config.max_client_buffer_len,
        )
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=_KEEPALIVE_S,
            shutdown_timeout=_FLUSH_S,
        )
        self._health: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve both edges; healthy as soon as a request could be served. Raises StartupError."""
        self.grpc_port = await self._server.start()
        self.http_port = await self._start_http()
        self.pipeline.open()
        status.report("waiting for a worker")
        self._health = asyncio.create_task(self._follow_readiness(), name="health")
        log.info("listening: http %d, grpc %d", self.http_port, self.grpc_port)

    async def stop(self) -> None:
        """Not ready at once; then what runs may end, in the configured time; then all stops."""
        await cancel_and_wait(self._health)
        await self._server.set_serving(False)
        status.report("draining")
        await self.pipeline.drain(self._config.drain_timeout_s)
        await asyncio.gather(self._server.stop(_FLUSH_S), self._runner.cleanup())
        await self.pipeline.close()

    async def _start_http(self) -> int:
        host, port = split_address(self._config.http, what="--http")
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        try:
            await site.start()
        except OSError as error:
            cause = "the port is in use" if error.errno == errno.EADDRINUSE else str(error)
            raise StartupError(
                f"can't listen on {self._config.http}: {cause}; "
                "stop what listens there or choose another with --http"
            ) from error
        return int(self._runner.addresses[0][1])

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
