"""Router processes that are each other's peers, and gateways that hold requests there.

`python -m tests.integration.several_routers_parts ADDRESSES ID SEED …` is such a gateway:
it routes a request for each seed, says so, and waits to be killed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc

from headrace import blocks, status
from headrace.service import settle_garbage
from headrace.v1 import router_pb2, router_pb2_grpc
from services.gateway.fleet import Plan
from services.gateway.peers import RouteQuery, RouterPeer
from tests.integration.router_parts import BLOCK_SIZE, MODEL, NAMESPACE, prompt

ROOT = Path(__file__).parents[2]


class RouterProcess:
    """`python -m services.router` at a fixed address, killed and started again at will."""

    def __init__(self, directory: Path, address: str, redis: str, peers: list[str]) -> None:
        self.address = address
        self._status = directory / address.replace(":", "-")
        self._flags = ["--listen", address, "--redis", redis, "--peers", ",".join(peers)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._status.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.router", *self._flags],
            cwd=ROOT,
            env={"HEADRACE_STATUS_FILE": str(self._status), "PATH": "/usr/bin:/bin"},
            stderr=subprocess.DEVNULL,
        )

    @property
    def is_ready(self) -> bool:
        return status.read(self._status) == status.Progress("ready")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def fleet(self) -> router_pb2.GetFleetResponse:
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            return await stub.GetFleet(router_pb2.GetFleetRequest(), timeout=10)


class GatewayProcess:
    """A gateway that has a request in flight for each of `seeds`, once `is_there` returned."""

    def __init__(self, addresses: list[str], gateway_id: str, seeds: range) -> None:
        arguments = [",".join(addresses), gateway_id, *map(str, seeds)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.several_routers_parts", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )

    async def is_there(self) -> None:
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        assert line == b"holding\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def peer(addresses: list[str], gateway_id: str) -> RouterPeer:
    """A gateway's end of all streams."""
    return RouterPeer(addresses, gateway_id=gateway_id, timeout_s=5, on_fleet=lambda _: None)


async def route(gateway: RouterPeer, seed: int, num_tokens: int = 600) -> Plan:
    """A plan for a prompt; those of one seed are one family."""
    query = RouteQuery(
        card=MODEL,
        token_ids=blocks.pack_tokens([0] * num_tokens),
        namespace_key=NAMESPACE,
        block_ids=prompt(num_tokens, seed),
        max_tokens=10,
        num_sequences=1,
        timeout_s=20,
    )
    assert len(query.block_ids or b"") == num_tokens // BLOCK_SIZE * blocks.ID_LEN
    return await gateway.route(query)


async def _hold(addresses: list[str], gateway_id: str, seeds: list[int]) -> None:
    gateway = peer(addresses, gateway_id)
    gateway.start()
    for seed in seeds:
        await route(gateway, seed)
    settle_garbage()
    print("holding", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_hold(sys.argv[1].split(","), sys.argv[2], [*map(int, sys.argv[3:])]))
