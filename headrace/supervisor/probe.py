"""Whether a process serves: gRPC health checking, or a Redis PING."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2

from headrace import status
from headrace.config import split_address
from headrace.rpc import options

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from headrace.supervisor.plan import ProcessSpec

#: How often, and how long for, a process is asked.
_INTERVAL_S = 0.05
_TIMEOUT_S = 2.0
_MAX_REPLY_LEN = 512


async def wait_serving(spec: ProcessSpec, status_path: Path) -> None:
    """Return once `spec`'s process serves, or says so where it keeps its status. Cancel it
    when the process has died."""
    if spec.probe == "status":
        await _until(lambda: _says_ready(status_path))
        return
    if spec.probe == "redis":
        await _until(lambda: answers_redis(spec.address))
        return
    async with grpc.aio.insecure_channel(spec.address, options=options.CHANNEL) as channel:
        await _until(lambda: _serves(channel))


async def serves_grpc(address: str) -> bool:
    """Whether what listens on `address` reports itself healthy, within two seconds."""
    async with grpc.aio.insecure_channel(address, options=options.CHANNEL) as channel:
        return await _serves(channel)


async def answers_redis(address: str) -> bool:
    """Whether a Redis or Valkey answers on `address`; one that asks for a password does."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"PING\r\n")
                reply = await reader.read(_MAX_REPLY_LEN)
            finally:
                writer.close()
    except OSError:
        # TimeoutError is one.
        return False
    return reply.startswith((b"+PONG", b"-NOAUTH"))


async def _says_ready(path: Path) -> bool:
    said = status.read(path)
    return said is not None and said.phase == status.READY


async def _until(ask: Callable[[], Awaitable[bool]]) -> None:
    # Another process's readiness is no event of ours: it is asked for.
    while True:
        if await ask():
            return
        await asyncio.sleep(_INTERVAL_S)


async def _serves(channel: grpc.aio.Channel) -> bool:
    # The stub that comes with the library has no types.
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    try:
        reply = await check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
