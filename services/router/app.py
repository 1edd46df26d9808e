"""The router's composition: Redis into the fleet, watches on workers, decisions on a port."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING

from headrace import status
from headrace.errors import StartupError
from headrace.registry import LEASE_TTL_MS
from headrace.rpc.server import Server, advertised
from headrace.service import cancel_and_wait, settle_garbage
from headrace.v1 import router_pb2
from headrace.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from services.router.fleet import Fleet
from services.router.objectives import Objectives
from services.router.ownership import Ownership
from services.router.peers import Peers
from services.router.policies import load_policy
from services.router.service import Router
from services.router.servicer import SERVICE_NAME, RouterServicer
from services.router.watcher import Watchers

if TYPE_CHECKING:
    from services.router.config import Config
    from services.router.prefix_index import PrefixIndex

log = logging.getLogger("headrace.router")

#: How long a router that starts waits for the health streams of workers that may be dead.
_WORKERS_WAITS, _WORKERS_WAIT_S = 20, 0.05
#: Between two slices of cleaning.
_CLEAN_PAUSE_S = 0.002


class App:
    """A whole router in one loop. `start` once, `close` at the end."""

    def __init__(self, config: Config, *, lease_ttl_ms: int = LEASE_TTL_MS) -> None:
        self.config = config
        self.fleet = Fleet()
        #: Drawn at random: it tells a router from its peers and from its last life.
        self.router_id = secrets.token_hex(8)
        policy = load_policy(config.policy)
        if config.max_waiting < 0:
            raise StartupError(f"--max-waiting must be 0 or more, not {config.max_waiting}")
        self.router = Router(
            self.fleet,
            policy,
            first_turn=int(self.router_id[:4], 16),
            objectives=Objectives.parse(config.slo_ttft_ms, config.slo_itl_ms),
            max_waiting=config.max_waiting,
        )
        self.ownership = Ownership(config.redis, self.fleet, lease_ttl_ms=lease_ttl_ms)
        self.server = Server(config.listen, [SERVICE_NAME])
        self.servicer = RouterServicer(self.router, self.router_id, self._describe)
        self.peers = Peers(config.peers, self.router_id, self.router.peers)
        self._watchers = Watchers(self.fleet, self.ownership.poll_soon)
        self._cleaner = _Cleaner(self.fleet.index)
        self.fleet.index.on_work = self._cleaner.wake
        add_RouterServiceServicer_to_server(self.servicer, self.server.grpc_server)

    @property
    def address(self) -> str:
        """What others reach it at, once started."""
        return advertised(self.config.listen, self.server.port, self.config.advertise)

    async def start(self) -> None:
        """Bind, and follow Redis. Raises StartupError. Healthy only after `ready`."""
        await self.server.start()
        self.ownership.start()
        self.peers.start()

    async def ready(self) -> None:
        """Wait for what Redis says and for the workers named there, then say that it serves."""
        await self.ownership.contacted.wait()
        for _ in range(_WORKERS_WAITS):
            if all(worker.reachable for worker in self.fleet.workers()):
                break
            await asyncio.sleep(_WORKERS_WAIT_S)
        self.servicer.is_open = True
        await self.server.set_serving(True)

    async def close(self) -> None:
        """Serve no more. Gateways fall back on the fleet that they were told."""
        await self.server.stop()
        await self.ownership.close()
        await self.peers.close()
        await self._watchers.close()
        self._cleaner.close()
        self.servicer.close()

    def _describe(self, response: router_pb2.GetFleetResponse) -> None:
        """What GetFleet tells of things that the servicer does not know."""
        response.router_id = self.router_id
        response.redis_connected = self.ownership.connected
        response.redis_trouble = self.ownership.trouble
        response.peers.extend(
            router_pb2.RouterPeerState(
                address=peer.address,
                router_id=peer.router_id,
                connected=peer.connected,
                reservations=self.router.peers.reservations(peer.address),
            )
            for peer in self.peers.states
        )


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Serve until `stop`."""
    app = App(config)
    status.report("starting")
    await app.start()
    log.info("listening on %s, policy %s", app.address, config.policy)
    status.report("waiting for Redis")
    becoming_ready = asyncio.create_task(_become_ready(app))
    try:
        await stop.wait()
    finally:
        await cancel_and_wait(becoming_ready)
        await app.close()


async def _become_ready(app: App) -> None:
    await app.ready()
    settle_garbage()
    status.report(status.READY)
    log.info("ready")


class _Cleaner:
    """Tidies the index in slices, so that no decision waits long."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """There is something to do."""
        if self._timer is None:
            self._schedule()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_CLEAN_PAUSE_S, self._clean)

    def _clean(self) -> None:
        self._timer = None
        if self._index.clean():
            self._schedule()
