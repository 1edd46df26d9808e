"""What is wrong with a Redis is said with cause and cure; all goes on, and recovers when mended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from headrace import redis_servers, registry
from headrace.errors import StartupError
from headrace.redis_outage import explain
from headrace.registry import Keys
from tests.integration.redis_parts.holders import Holder, Mirror
from tests.integration.redis_parts.servers import Server
from tests.integration.router_parts import LEASE_TTL_MS, MODEL, until

KEYS = Keys(MODEL.name)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        yield server


async def said_and_mended(
    url: str, worker_says: str, router_says: str, mend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker and a router meet the trouble, say it once, and converge when it is mended."""
    worker = await Holder(url, "w").start()
    async with Mirror(url) as mirror:
        worker.step()
        await until("the worker says it", lambda: worker_says in worker.publisher.trouble)
        if router_says:
            await until("the router says it", lambda: router_says in mirror.ownership.trouble)
        assert not worker.publisher.registered.is_set()
        said = [r for r in caplog.records if worker_says in r.getMessage()]
        assert len([r for r in said if r.name == "headrace.worker"]) == 1
        await asyncio.gather(*filter(None, [mend()]))
        await mirror.converged(worker)
        assert not worker.publisher.trouble
        await until("the router is content", lambda: not mirror.ownership.trouble)
    await worker.leave()


async def test_something_else_answers_there(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        writer.close()

    server.kill()
    web = await asyncio.start_server(answer, "127.0.0.1", server.port)

    async def mend() -> None:
        web.close()
        await web.wait_closed()
        server.start()

    await said_and_mended(server.url, "is no Redis", "is no Redis", mend, caplog)


async def test_a_wrong_password(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with server.client() as client:
        client.execute_command("ACL SETUSER mesh on >right ~* +@all")
        url = f"redis://mesh:wr0ng@127.0.0.1:{server.port}/0"
        await said_and_mended(
            url,
            "user or password in the Redis URL is wrong",
            "user or password in the Redis URL is wrong",
            lambda: client.execute_command("ACL SETUSER mesh >wr0ng") and None,
            caplog,
        )
    assert "wr0ng" not in caplog.text, "a password was logged"


async def test_no_password_where_one_is_wanted(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with server.client() as client:
        client.config_set("requirepass", "secret")
        await said_and_mended(
            server.url,
            "put them in the Redis URL",
            "put them in the Redis URL",
            lambda: client.config_set("requirepass", "") and None,
            caplog,
        )


async def test_a_user_without_the_rights(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with server.client() as client:
        client.execute_command("ACL SETUSER mesh on >right ~headrace:* -@all +ping +hgetall +info")
        await said_and_mended(
            f"redis://mesh:right@127.0.0.1:{server.port}/0",
            "has the ACL rule",
            "has the ACL rule",
            lambda: client.execute_command("ACL SETUSER mesh +@all") and None,
            caplog,
        )


async def test_a_read_only_replica(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replica = Server(tmp_path, "--replicaof", f"127.0.0.1 {server.port}")
    with replica, replica.client() as client:
        await until("it follows", lambda: client.info("replication")["master_link_status"] == "up")
        # Following it would do: only writing is refused.
        await said_and_mended(
            replica.url,
            "name the primary",
            "",
            lambda: client.execute_command("REPLICAOF NO ONE") and None,
            caplog,
        )


async def test_a_full_redis_refuses_news_and_removes_nobody(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await (await Holder(server.url, "w").start()).registered()
    worker.step()
    with server.client() as client:
        async with Mirror(server.url) as mirror:
            await mirror.converged(worker)
            generation = worker.publisher.generation
            before = mirror.known()
            client.config_set("maxmemory", 1)
            worker.step()
            await until("it is said", lambda: "raise its maxmemory" in worker.publisher.trouble)
            newcomer = await Holder(server.url, "newcomer").start()
            await until("the same", lambda: "raise its maxmemory" in newcomer.publisher.trouble)
            settled = asyncio.get_running_loop().time() + 1.5 * LEASE_TTL_MS / 1000
            while asyncio.get_running_loop().time() < settled:
                assert mirror.known() == before
                await asyncio.sleep(0.05)
            client.config_set("maxmemory", 0)
            await mirror.converged(worker, newcomer)
            assert worker.publisher.generation == generation
            assert not mirror.left
            await newcomer.leave()
    await worker.leave()
    assert caplog.text.count("raise its maxmemory") <= 4


async def test_malformed_cards_are_replaced_by_their_owners(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await (await Holder(server.url, "w").start()).registered()
    with server.client() as client:
        async with Mirror(server.url) as mirror:
            worker.step()
            await mirror.converged(worker)
            for bad in (b"{", b"[]", b'{"name": 7}', b"\xff\xfe", b'{"num_partitions": 0}'):
                client.hset(registry.MODELS_KEY, MODEL.name, bad)
                client.hset(registry.MODELS_KEY, "stranger", bad)
                client.set(KEYS.worker("w"), bad, px=LEASE_TTL_MS)
                worker.step()

                def is_mended(bad: bytes = bad) -> bool:
                    model = client.hget(registry.MODELS_KEY, MODEL.name)
                    return bad not in (model, client.get(KEYS.worker("w")))

                await until("both are mended", is_mended)
                await mirror.converged(worker)
            assert not mirror.left
            assert set(mirror.fleet.models) == {MODEL.name}
    await worker.leave()
    assert "malformed card of b'stranger'" in caplog.text


async def test_keys_of_other_types_are_an_error_and_no_end(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with server.client() as client:
        client.set(registry.MODELS_KEY, "mine")
        await said_and_mended(
            server.url, "WRONGTYPE", "WRONGTYPE", lambda: client.flushall() and None, caplog
        )


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("tokenizer digest", {"model": replace(MODEL, tokenizer_digest="another")}),
        ("block size", {"model": replace(MODEL, block_size=32)}),
        ("block ids", {"hash_vector": "00"}),
    ],
)
async def test_a_worker_that_disagrees_is_refused_loudly(
    server: Server, what: str, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    worker = await (await Holder(server.url, "w").start()).registered()
    async with Mirror(server.url) as mirror:
        await mirror.converged(worker)
        stranger = await (await Holder(server.url, "stranger", **fields).start()).registered()
        refused = mirror.fleet.models[MODEL.name].refused
        with caplog.at_level(logging.ERROR):
            await until("it is refused", lambda: "stranger" in refused)
            stranger.step()
            worker.step()
            await mirror.converged(worker)
        assert what in refused["stranger"].reason
        await stranger.leave()
        await until("it is forgotten", lambda: not refused)
    await worker.leave()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:6379", "it must begin with redis://"),
        ("127.0.0.1:6379", "it must begin with redis://"),
        ("redis+unix:///tmp/x", "it must begin with redis://"),
        ("redis://127.0.0.1:sixty", "'127.0.0.1:sixty' is not HOST:PORT"),
        ("redis://127.0.0.1/0?no_such_option=1", "no_such_option"),
        ("redis://127.0.0.1/0?socket_timeout=soon", "socket_timeout"),
        ("rediss://127.0.0.1/0?ssl_ca_certs=/no/such.crt", "no file /no/such.crt"),
        ("redis+sentinel://127.0.0.1:26379", "the primary's name is missing"),
        ("redis+sentinel://127.0.0.1:99999/mesh", "is not HOST:PORT"),
        ("redis+cluster://127.0.0.1:6379/3", "database 0 only"),
        ("redis+cluster://user:secret@a:1,:2", "is not HOST:PORT"),
    ],
)
def test_a_url_that_cannot_be_meant(url: str, why: str) -> None:
    with pytest.raises(StartupError) as caught:
        redis_servers.servers(url)
    assert why in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@db:6379/0", "redis://user:***@db:6379/0"),
        ("redis://:se@cret@db:6379/0", "redis://:***@db:6379/0"),
        (
            "redis+sentinel://u:p@a:1,b:2/mesh?sentinel_password=secret&db=1",
            "redis+sentinel://u:***@a:1,b:2/mesh?sentinel_password=***&db=1",
        ),
        ("unix:///run/valkey.sock", "unix:///run/valkey.sock"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert redis_servers.redact(url) == shown


def test_an_error_without_words_has_a_name() -> None:
    assert explain(TimeoutError()) == "TimeoutError"
