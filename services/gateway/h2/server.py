"""The public gRPC server: a listener, a table of methods, and a task for each call.

It takes servicers as grpc's generated code registers them, all four kinds of
methods, written for asyncio. Health checking and reflection come with it. It knows
no frames.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from headrace.config import split_address
from headrace.errors import InvalidArgument, ResourceExhausted, StartupError
from headrace.rpc.errors import from_exception
from headrace.service import cancel_and_wait
from services.gateway.h2 import wire
from services.gateway.h2.call import AbortedError, ServerCall
from services.gateway.h2.connection import Connection

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping, Sequence

    from headrace.errors import HeadraceError

log = logging.getLogger("headrace.gateway.grpc")

MAX_CONNECTIONS = 20_000
#: Calls at once, over all connections, whatever they wait for.
MAX_CALLS = 16_384
#: Bytes of messages that are not complete, over all connections.
MAX_HELD_LEN = 256 << 20
_BACKLOG = 1024


class MethodTable:
    """Where generated code registers servicers, as on a `grpc.aio.Server`."""

    def __init__(self) -> None:
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """The methods of one service, by name."""
        for name, handler in handlers.items():
            self._methods[f"/{service}/{name}"] = handler

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Generated code registers each service both ways; the other one is read."""

    def find(self, path: str) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._methods.get(path)


class EdgeServer:
    """Add servicers to `grpc_server`, then `start` inside the loop.

    `service_names` are the full names of what is added; health is reported for each
    and for the whole (""). Connections older than `max_age_s` (0: none is too old;
    drawn ±10 % so that not all go at once) are told to go, and closed `age_grace_s`
    later at the latest. `reuse_port` lets several processes share the port.
    Beyond `max_connections` clients are turned away.
    """

    def __init__(
        self,
        listen: str,
        service_names: Sequence[str],
        *,
        reuse_port: bool = False,
        max_connections: int = MAX_CONNECTIONS,
        max_age_s: float = 0.0,
        age_grace_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        split_address(listen, what="--grpc")
        self.listen = listen
        self.port = 0
        self.service_names = tuple(service_names)
        #: A `grpc.aio.Server` for those who register servicers.
        self.grpc_server = cast("Any", MethodTable())
        self.held_len = 0
        self._reuse_port = reuse_port
        self._max_connections = max_connections
        self._max_age_s = max_age_s
        self._age_grace_s = age_grace_s
        self._tls = tls
        if tls is not None:
            # Without it a gRPC client won't talk HTTP/2 to us.
            tls.set_alpn_protocols(["h2"])
        self._listener: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        names = (*self.service_names, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        add_reflection: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        add_reflection(reflection.aio.ReflectionServicer(names), self.grpc_server)

    async def start(self) -> int:
        """Bind and serve, not yet healthy. Returns the port. Raises StartupError."""
        host, port = split_address(self.listen)
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                self._connect,
                host,
                port,
                backlog=_BACKLOG,
                reuse_port=self._reuse_port or None,
                ssl=self._tls,
            )
        except OSError as error:
            raise StartupError(
                f"can't listen on {self.listen}: the port is in use or not ours "
                f"({error.strerror}); stop what listens there or choose another"
            ) from error
        self.port = int(self._listener.sockets[0].getsockname()[1])
        await self.set_serving(False)
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
        """Take nothing new; what runs may end within `grace_s`; then close all."""
        await self._health.enter_graceful_shutdown()
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.leave(grace_s)
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        for connection in list(self._connections):
            connection.abort()
        await self._idle.wait()
        await cancel_and_wait(*self._tasks)

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    @property
    def num_calls(self) -> int:
        """Calls whose handlers run."""
        return len(self._tasks)

    # What connections want, see `connection.Host`.

    def start_call(self, call: ServerCall) -> None:
        handler = self.grpc_server.find(call.head.path)
        if handler is None:
            unknown = grpc.StatusCode.UNIMPLEMENTED.value[0]
            call.finish(unknown, f"there is no method {call.head.path[:200]}")
        elif not wire.is_known_encoding(call.head.encoding):
            text = f"grpc-encoding must be one of {wire.ACCEPTED_ENCODINGS}"
            call.finish(grpc.StatusCode.UNIMPLEMENTED.value[0], text)
        elif handler.request_streaming or call.requests_ended:
            self._launch(call, handler)
        else:
            # No task for a call before there is something to do.
            call.on_request = lambda: self._launch(call, handler)

    def refusal(self) -> HeadraceError | None:
        if len(self._tasks) < MAX_CALLS:
            return None
        return ResourceExhausted(f"{MAX_CALLS} calls run here already", retry_after_ms=1000)

    def may_hold(self, num_bytes: int) -> bool:
        return self.held_len + num_bytes <= MAX_HELD_LEN

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._idle.set()

    def _connect(self) -> asyncio.Protocol:
        if len(self._connections) >= self._max_connections:
            return _Refusal()
        age_s = self._max_age_s * random.uniform(0.9, 1.1)
        connection = Connection(self, max_age_s=age_s, age_grace_s=self._age_grace_s)
        self._connections.add(connection)
        self._idle.clear()
        return connection

    def _launch(self, call: ServerCall, handler: grpc.RpcMethodHandler[Any, Any]) -> None:
        call.on_request = None
        call.serialize = handler.response_serializer or _as_it_is
        task = asyncio.get_running_loop().create_task(self._run(call, handler))
        call.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, call: ServerCall, handler: grpc.RpcMethodHandler[Any, Any]) -> None:
        try:
            await _serve(call, handler)
            call.succeed()
        except AbortedError:
            pass  # its status is on its way
        except asyncio.CancelledError:
            # The client left, the deadline passed, or the server stops.
            call.finish(grpc.StatusCode.CANCELLED.value[0], "the call was cancelled")
        except Exception as error:  # noqa: BLE001 - every failure gets its status
            call.fail(from_exception(error))


async def _serve(call: ServerCall, handler: grpc.RpcMethodHandler[Any, Any]) -> None:
    """Call the servicer's method, as the kind of its RPC wants it."""
    parse = _parser(handler.request_deserializer or _as_it_is)
    request: Any
    if handler.request_streaming:
        request = call.messages(parse)
    else:
        data = await call.next_message()
        if data is None:
            raise InvalidArgument("the call ended without a request")
        request = parse(data)
    methods: Any = handler
    if handler.response_streaming:
        method = methods.stream_stream if handler.request_streaming else methods.unary_stream
        answer = method(request, call)
        if inspect.isawaitable(answer):
            await answer
        else:
            # Closed at once also when this is cancelled between two messages.
            async with aclosing(answer):
                async for message in answer:
                    await call.write(message)
        return
    method = methods.stream_unary if handler.request_streaming else methods.unary_unary
    call.send(call.serialize(await method(request, call)))


def _parser(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def checked(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            raise InvalidArgument(f"the request is malformed: {error}") from None

    return checked


def _as_it_is(message: Any) -> Any:
    return message


class _Refusal(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).abort()
