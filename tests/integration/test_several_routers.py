"""Several routers of the same workers: loads are shared, and none is left behind by anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.gateway.peers import RouterPeer
from tests.integration.router_parts import FakeWorker, Valkey, WorkerProcess, free_port, until
from tests.integration.several_routers_parts import GatewayProcess, RouterProcess, peer, route

NUM_ROUTERS = 3


@pytest.fixture
async def routers(
    tmp_path: Path, valkey: Valkey, workers: list[FakeWorker]
) -> AsyncIterator[list[RouterProcess]]:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(NUM_ROUTERS)]
    routers = [RouterProcess(tmp_path, address, valkey.url, addresses) for address in addresses]
    for router in routers:
        router.start()
    try:
        for router in routers:
            await until("it is ready", lambda router=router: router.is_ready, 60)
        await agree(routers, [0] * NUM_ROUTERS)
        yield routers
    finally:
        for router in routers:
            router.kill()


@pytest.fixture
async def gateway(routers: list[RouterProcess]) -> AsyncIterator[RouterPeer]:
    gateway = peer([router.address for router in routers], "gateway")
    gateway.start()
    await until("all routers answer", lambda: all(r.connected for r in gateway._routers))
    yield gateway
    await gateway.close()


async def counts(routers: list[RouterProcess]) -> list[tuple[int, int]]:
    """For each router: requests that it placed, and those that its peers say they placed."""
    counts = []
    for router in routers:
        fleet = await router.fleet()
        states = [state for model in fleet.models for state in model.workers]
        own = sum(state.reservations for state in states)
        counts.append((own, sum(state.peer_reservations for state in states)))
    return counts


async def agree(routers: list[RouterProcess], own: list[int] | int) -> None:
    """Wait until each router has so many (or all together), and each knows of all the others'."""
    for _ in range(1500):
        got = await counts(routers)
        mine = [count for count, _ in got]
        fits = mine == own if isinstance(own, list) else sum(mine) == own
        if fits and all(count + others == sum(mine) for count, others in got):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"routers have {got}, not {own}")


async def only(routers: list[RouterProcess], address: str) -> None:
    """Wait until every router would choose the worker at `address`, and no other."""
    for _ in range(1500):
        fleets = [await router.fleet() for router in routers]
        states = [[s for m in fleet.models for s in m.workers] for fleet in fleets]
        reachable = [[s.worker.address for s in known if s.reachable] for known in states]
        if reachable == [[address]] * len(routers):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{reachable}, not {address}")


async def decisions(routers: list[RouterProcess]) -> list[int]:
    return [(await router.fleet()).counters.decisions for router in routers]


async def test_a_family_has_one_router_and_all_know_its_load(
    routers: list[RouterProcess], gateway: RouterPeer
) -> None:
    for _ in range(5):
        await route(gateway, seed=1)
    assert sorted(await decisions(routers)) == [0, 0, 5]
    plans = [await route(gateway, seed=seed) for seed in range(2, 25)]
    assert min(await decisions(routers)) > 0
    await agree(routers, 28)
    # Whoever chose: all together filled both workers alike.
    fleet = await routers[0].fleet()
    totals = [s.reservations + s.peer_reservations for s in fleet.models[0].workers]
    assert max(totals) - min(totals) <= 6
    assert [p.connected for p in fleet.peers] == [True] * (NUM_ROUTERS - 1)
    for plan in plans:
        gateway.release(plan.reservation_id)
    await agree(routers, 5)


async def test_a_killed_routers_families_and_load_go_to_the_next(
    routers: list[RouterProcess], gateway: RouterPeer
) -> None:
    plans = [await route(gateway, seed=seed) for seed in range(12)]
    await agree(routers, 12)
    before = await decisions(routers)
    killed, *others = routers
    assert before[0] > 0
    killed.kill()
    # Nobody waits for it: not what is asked meanwhile, nor what it had placed.
    plans += [await route(gateway, seed=seed) for seed in range(12)]
    assert gateway.num_fallbacks == 0
    await agree(others, 24)
    killed.start()
    await until("it is back", lambda: all(r.connected for r in gateway._routers), 60)
    await agree(routers, 24)
    assert (await decisions([killed])) == [0]
    plans += [await route(gateway, seed=seed) for seed in range(12)]
    assert (await decisions([killed])) == before[:1]
    for plan in plans:
        gateway.release(plan.reservation_id)
    await agree(routers, 0)


async def test_killed_gateways_leave_no_load(routers: list[RouterProcess]) -> None:
    addresses = [router.address for router in routers]
    for life in range(3):
        gateways = [
            GatewayProcess(addresses, f"g{number}", range(10 * number, 10 * number + 6))
            for number in range(2)
        ]
        try:
            for held in gateways:
                await held.is_there()
            await agree(routers, 12)
        finally:
            for held in gateways:
                held.kill()
        await agree(routers, [0] * NUM_ROUTERS)
        assert sum(await decisions(routers)) == 12 * (life + 1)


async def test_killed_workers_leave_no_load(
    valkey: Valkey, routers: list[RouterProcess], workers: list[FakeWorker], gateway: RouterPeer
) -> None:
    for worker in workers:
        await worker.stop_serving()
    for generation in range(1, 4):
        worker = FakeWorker(valkey.url, "mortal", generation=generation)
        process = WorkerProcess("mortal", worker.port)
        try:
            await worker.start(serve=False)
            await only(routers, worker.address)
            await asyncio.gather(*(route(gateway, seed) for seed in range(6)))
            # What the last generation had is gone, though the gateway released nothing.
            await agree(routers, 6)
        finally:
            process.end()
            await worker.stop_renewing()
            await worker.close()
