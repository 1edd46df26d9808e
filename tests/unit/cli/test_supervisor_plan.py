"""Which processes a mesh is, their ports and command lines."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from msgspec import structs

from headrace import registry
from headrace.errors import StartupError
from headrace.supervisor import plan, ports
from headrace.supervisor.plan import MeshConfig, ProcessSpec

EMBEDDED = MeshConfig("m=/models/m.gguf", "sim", 2, "127.0.0.1:8080", "0.0.0.0:50051")
ADDRESSES = [f"127.0.0.1:{port}" for port in range(20001, 20006)]


def specs_of(config: MeshConfig, *, num_cores: int = 8) -> dict[str, ProcessSpec]:
    specs = plan.processes(config, ADDRESSES, Path("/state"), num_cores=num_cores, host="h1")
    return {spec.name: spec for spec in specs}


def flag(spec: ProcessSpec, name: str) -> str:
    return spec.argv[spec.argv.index(name) + 1]


def test_a_mesh_is_its_services_and_a_valkey() -> None:
    specs = specs_of(EMBEDDED)
    assert list(specs) == ["valkey", "tokenizer", "router", "worker-0", "worker-1", "gateway"]
    assert plan.num_addresses(EMBEDDED) == len(ADDRESSES)
    assert len({spec.address for spec in specs.values()}) == len(specs)


def test_peers_are_told_each_others_addresses() -> None:
    specs = specs_of(EMBEDDED)
    gateway = specs["gateway"]
    assert flag(gateway, "--router") == flag(specs["router"], "--listen")
    assert flag(gateway, "--tokenizer") == flag(specs["tokenizer"], "--listen")
    assert gateway.address == "127.0.0.1:50051"
    redis = f"redis://{specs['valkey'].address}/0"
    assert specs["router"].environment == {"HEADRACE_ROUTER_REDIS": redis}
    assert specs["worker-1"].environment == {"HEADRACE_WORKER_REDIS": redis}


def test_cores_are_shared_out_among_workers() -> None:
    assert flag(specs_of(EMBEDDED, num_cores=8)["worker-0"], "--num-threads") == "4"
    assert flag(specs_of(EMBEDDED, num_cores=1)["worker-0"], "--num-threads") == "1"


def test_a_redis_of_the_users_own_is_not_started_and_not_shown() -> None:
    url = "redis://:secret@db:6379/0"
    specs = specs_of(MeshConfig("m=/m.gguf", "sim", 2, "127.0.0.1:1", "127.0.0.1:9", url))
    assert "valkey" not in specs
    assert all("secret" not in argument for spec in specs.values() for argument in spec.argv)
    assert specs["router"].environment["HEADRACE_ROUTER_REDIS"] == url
    # Another machine's mesh on the same Redis has workers of its own.
    assert flag(specs["worker-1"], "--worker-id") == "h1-9-worker-1"


def test_a_password_is_not_shown() -> None:
    assert registry.redact("redis://user:secret@db:6379/0") == "redis://user:***@db:6379/0"
    assert registry.redact("redis://db:6379/0") == "redis://db:6379/0"
    assert registry.redact("") == ""


def test_free_addresses_are_different_and_out_of_the_kernels_way() -> None:
    found = ports.free_addresses(20)
    numbers = [int(address.rpartition(":")[2]) for address in found]
    assert len(set(numbers)) == 20
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(numbers) < first


def test_a_taken_port_names_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StartupError, match=f"--http 127.0.0.1:{port}: the port is in use"):
            ports.check_free(f"127.0.0.1:{port}", "--http")


def test_port_zero_becomes_a_free_one() -> None:
    address = ports.check_free("127.0.0.1:0", "--grpc")
    assert not address.endswith(":0")


@pytest.mark.parametrize("address", ["8080", "127.0.0.1:", "127.0.0.1:x", "host.invalid:80"])
def test_a_bad_address_names_the_flag(address: str) -> None:
    with pytest.raises(StartupError, match="--http"):
        ports.check_free(address, "--http")


@pytest.mark.parametrize("url", ["http://x", "redis://127.0.0.1:1/0", "unix:///nowhere.sock"])
def test_a_redis_that_is_not_there_names_the_flag(url: str) -> None:
    with pytest.raises(StartupError, match="--redis"):
        ports.check_redis(url)


def test_several_gateways_share_both_ports() -> None:
    found = specs_of(structs.replace(EMBEDDED, num_gateways=3))
    gateways = [spec for spec in found.values() if spec.role == "gateway"]
    assert [spec.name for spec in gateways] == ["gateway-0", "gateway-1", "gateway-2"]
    assert {spec.argv for spec in gateways} == {gateways[0].argv}
    assert "--reuse-port" in gateways[0].argv
    assert {spec.probe for spec in gateways} == {"status"}
