"""What several integration tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from headrace import registry
from tests.integration.router_parts import FakeWorker, Valkey


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    """One server for a module's tests."""
    valkey = Valkey()
    yield valkey
    valkey.stop()


@pytest.fixture
async def valkey(server: Valkey) -> Valkey:
    """The module's server, emptied."""
    client = registry.connect(server.url)
    await client.flushall()
    await client.aclose()
    return server


@pytest.fixture
async def workers(valkey: Valkey) -> AsyncIterator[list[FakeWorker]]:
    """Two that publish and answer, without engines."""
    workers = [FakeWorker(valkey.url, "one"), FakeWorker(valkey.url, "two")]
    for worker in workers:
        await worker.start()
    yield workers
    for worker in workers:
        await worker.close()
