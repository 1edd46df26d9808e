"""A gRPC server with health checking and reflection, bound or refused clearly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headrace.config import split_address
from headrace.errors import StartupError
from headrace.rpc import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace.rpc.options import Options


class Server:
    """A grpc.aio server. Add servicers to `grpc_server`, then `start`.

    `service_names` are the full names of what is added; health is reported for
    each and for the whole ("").
    """

    def __init__(
        self, listen: str, service_names: Sequence[str], *, settings: Options | None = None
    ) -> None:
        split_address(listen, what="the listen address")
        self.listen = listen
        self.port = 0
        self.service_names = tuple(service_names)
        self.grpc_server = grpc.aio.server(options=settings or options.SERVER)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        names = (*self.service_names, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc_server)

    async def start(self) -> int:
        """Bind and serve, not yet healthy. Returns the port. Raises StartupError."""
        try:
            self.port = self.grpc_server.add_insecure_port(self.listen)
        except RuntimeError as error:
            raise StartupError(
                f"can't listen on {self.listen}: the port is in use or not ours; "
                "stop what listens there or choose another"
            ) from error
        await self.set_serving(False)
        await self.grpc_server.start()
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """Report health for every service and for the whole."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in (*self.service_names, ""):
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stop; long-lived streams would use the whole of `grace_s`: end them first."""
        await self._health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace_s)


def advertised(listen: str, port: int, advertise: str | None) -> str:
    """The address that others reach this server at."""
    if advertise:
        return advertise
    host, _ = split_address(listen)
    return f"{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
