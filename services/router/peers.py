"""Other routers: what each has reserved, over one stream to each.

A task per peer keeps `RouterService.WatchLoads` open and hands what comes to
`PeerLoads`; when the stream ends, what the peer said is forgotten. A list of peers
may name this router too, so that all can be started with the same one: it finds
itself by its id, and stops asking.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import grpc

from headrace.rpc import options
from headrace.service import cancel_and_wait
from headrace.v1 import router_pb2, router_pb2_grpc
from services.router import convert

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.router.peer_loads import PeerLoads

    _Stream = grpc.aio.UnaryStreamCall[router_pb2.WatchLoadsRequest, router_pb2.WatchLoadsResponse]

log = logging.getLogger("headrace.router")

_RECONNECT_S = 0.2


@dataclass(slots=True)
class PeerState:
    """One peer, as it is now."""

    address: str
    router_id: str = ""
    connected: bool = False


class Peers:
    """Streams to all other routers. `start` inside the loop, `close` before it ends."""

    def __init__(self, addresses: Iterable[str], router_id: str, loads: PeerLoads) -> None:
        self.states = [PeerState(address) for address in dict.fromkeys(addresses)]
        self._router_id = router_id
        self._loads = loads
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Connect, and stay connected."""
        self._tasks = [
            asyncio.create_task(self._follow(state), name=f"peer {state.address}")
            for state in self.states
        ]

    async def close(self) -> None:
        """Follow no more."""
        await cancel_and_wait(*self._tasks)

    async def _follow(self, state: PeerState) -> None:
        async with grpc.aio.insecure_channel(state.address, options=options.CHANNEL) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            while True:
                reason = "it closed the stream"
                try:
                    if await self._listen(stub, state):
                        return
                except grpc.aio.AioRpcError as error:
                    reason = error.code().name
                except Exception as error:
                    # Whatever it is, this must go on, or the peer's load is unknown for ever.
                    log.exception("following router %s failed", state.address)
                    reason = type(error).__name__
                finally:
                    self._loads.forget(state.address)
                    was_connected, state.connected = state.connected, False
                if was_connected:
                    log.warning("router %s is lost: %s", state.address, reason)
                await asyncio.sleep(_RECONNECT_S)

    async def _listen(self, stub: router_pb2_grpc.RouterServiceStub, state: PeerState) -> bool:
        """Follow one stream to its end. Returns whether it came from this router itself."""
        request = router_pb2.WatchLoadsRequest(router_id=self._router_id)
        stream = cast("_Stream", stub.WatchLoads(request))
        try:
            async for message in stream:
                if message.router_id == self._router_id:
                    self.states.remove(state)
                    return True
                if not state.connected:
                    log.info("router %s (%s) is a peer", message.router_id, state.address)
                state.router_id, state.connected = message.router_id, True
                self._loads.said(state.address, map(convert.reserved, message.loads))
            return False
        finally:
            stream.cancel()
