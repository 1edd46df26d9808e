"""From what a user asked for to a running mesh: checks first, then everything at once."""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from headrace.models.store import resolve
from headrace.service import cancel_and_wait
from headrace.supervisor import plan, ports
from headrace.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from headrace.supervisor.plan import MeshConfig, ProcessSpec
    from headrace.supervisor.state import StateDir

#: `make` passes on a signal that its whole process group got: that is no second one.
_SAME_SIGNAL_S = 0.5


def prepare(config: MeshConfig) -> MeshConfig:
    """`config` with the model found and ports chosen. Starts nothing.

    Raises StartupError naming the flag at fault and what to do.
    """
    if config.num_workers < 1:
        raise StartupError(f"--workers must be 1 or more, not {config.num_workers}")
    if config.num_gateways < 1:
        raise StartupError(f"--gateway-processes must be 1 or more, not {config.num_gateways}")
    files = resolve(config.model)
    http = ports.check_free(config.http, "--http")
    grpc = ports.check_free(config.grpc, "--grpc")
    if http == grpc:
        raise StartupError(f"--http and --grpc are both {http}; each needs a port of its own")
    if config.redis:
        ports.check_redis(config.redis)
    else:
        plan.valkey_binary()
    return plan.MeshConfig(
        model=f"{files.name}={files.path.resolve()}",
        engine=config.engine,
        num_workers=config.num_workers,
        http=http,
        grpc=grpc,
        redis=config.redis,
        num_gateways=config.num_gateways,
    )


def processes(config: MeshConfig, state: StateDir) -> list[ProcessSpec]:
    """The processes of a prepared mesh, on ports that are free now."""
    taken = frozenset(int(a.rpartition(":")[2]) for a in (config.http, config.grpc))
    return plan.processes(
        config,
        ports.free_addresses(plan.num_addresses(config), taken),
        state.valkey,
        num_cores=plan.num_cores(),
        host=socket.gethostname(),
    )


async def serve(
    config: MeshConfig,
    specs: Sequence[ProcessSpec],
    state: StateDir,
    tell: Callable[[str], None],
    watch: Callable[[Supervisor], Awaitable[None]] | None = None,
) -> None:
    """Run a prepared mesh's processes until SIGTERM, SIGINT or SIGHUP; a second one hurries.

    Runs in the main thread, with the state's lock held. `watch` runs beside it
    until it returns. Raises StartupError if the mesh can't start.
    """

    def say(text: str) -> None:
        # The terminal may be gone: the mesh goes on, and stops in order.
        with suppress(OSError):
            tell(text)

    supervisor = Supervisor(config, specs, state, say)
    stop = asyncio.Event()

    loop = asyncio.get_running_loop()
    asked_at = 0.0

    def on_signal() -> None:
        nonlocal asked_at
        if not stop.is_set():
            asked_at = loop.time()
            stop.set()
            say("stopping: requests in flight are finished first; once more stops at once")
        elif loop.time() - asked_at > _SAME_SIGNAL_S:
            supervisor.force()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    watcher = asyncio.ensure_future(watch(supervisor)) if watch else None
    try:
        await supervisor.run(stop)
    finally:
        await cancel_and_wait(watcher)
