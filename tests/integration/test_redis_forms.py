"""The same life of workers and a router on every form of Redis that a URL can name.

Containers of the official images run it too, where a Docker engine answers.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import redis

from headrace import registry
from tests.integration.redis_parts import servers
from tests.integration.redis_parts.holders import Holder, Mirror
from tests.integration.redis_parts.servers import Form
from tests.integration.router_parts import MODEL, until

IMAGES = ("redis:6.2", "redis:7.4", "redis:8.0", "valkey/valkey:7.2", "valkey/valkey:8.1")
TIERS = ("device", "host")


@pytest.fixture(params=[*servers.FORMS, *IMAGES])
def form(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Form]:
    """Redis in one form, empty."""
    start = servers.FORMS.get(request.param)
    if start is None:
        yield from _container(request.param)
        return
    with start(tmp_path) as form:
        yield form
        form.close()


@cache
def _docker_answers() -> bool:
    docker = shutil.which("docker")
    if docker is None:
        return False
    return not subprocess.run([docker, "version"], capture_output=True, timeout=20).returncode


def _container(image: str) -> Iterator[Form]:
    if not _docker_answers():
        pytest.skip(f"no Docker engine answers here, so this did not run on {image}")
    from testcontainers.core.container import DockerContainer

    with DockerContainer(image).with_exposed_ports(6379) as container:
        host, port = container.get_container_host_ip(), int(container.get_exposed_port(6379))
        client = redis.Redis(host=host, port=port)

        def answers() -> bool:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

        servers.wait_for("the container answers", answers, 60)
        form = Form(f"redis://{host}:{port}/0", client)
        yield form
        form.close()


def test_the_documented_rule_is_the_tested_one_and_old_enough(tmp_path: Path) -> None:
    documented = " ".join(Path("docs/running.md").read_text().split())
    assert f"ACL SETUSER mesh on >password {servers.ACL_RULE}" in documented
    commands = [word[1:] for word in servers.ACL_RULE.split() if word.startswith("+")]
    with servers.Server(tmp_path) as server, server.client() as client:
        for command in commands:
            name, _, part = command.partition("|")
            (known,) = client.execute_command("COMMAND DOCS", name).values()
            if part:
                known = known[b"subcommands"][command.encode()]
            since = tuple(map(int, known[b"since"].split(b".")))
            assert since < (6, 3), f"{command} is not in Redis 6.2"


async def test_workers_of_several_tiers_and_partitions_are_mirrored_and_leave_nothing(
    form: Form,
) -> None:
    async with Mirror(form.url) as mirror:
        workers = [
            await Holder(form.url, f"w{number}", tiers=TIERS, num_partitions=4).start()
            for number in range(6)
        ]
        try:
            for worker in workers:
                await worker.registered()
            for _ in range(30):
                for worker in workers:
                    worker.step()
            await mirror.converged(*workers)
            assert min(len(blocks) for blocks in workers[0].truth().values()) > 100
            assert {mirror.why(worker.worker_id) for worker in workers} == {"new"}
            assert len(mirror.ownership._partitions[MODEL.name]) == 4
            used = {registry.partition_of(worker.worker_id, 4) for worker in workers}
            assert len(used) > 1, "the workers' names do not spread"

            # A router that comes later sees the same.
            async with Mirror(form.url) as late:
                await late.converged(*workers)
        finally:
            for worker in workers:
                await worker.leave()
        await until("all are gone", lambda: not mirror.known())
    streams = sorted(registry.Keys(MODEL.name, partition).events.encode() for partition in used)
    assert form.keys() == sorted([registry.MODELS_KEY.encode(), *streams])
