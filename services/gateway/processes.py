"""Several gateway processes on one pair of ports: started, kept running, stopped together.

    parent ── holds both ports, without listening; starts, and starts again
      ├── gateway ── listens with SO_REUSEPORT; a loop, an identity, streams of its own
      └── gateway …

The kernel spreads connections over those that listen. One that dies takes its own
connections with it and no others; while it is away the rest serve. The parent sees no
request, and knows nothing of the mesh.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from headrace import status
from headrace.config import split_address
from headrace.errors import StartupError
from headrace.service import EXIT_CONFIG, refuse, setup_logs
from headrace.supervisor import launch, policy, ports

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.gateway.config import GatewayConfig

log = logging.getLogger("headrace.gateway")

#: What a process may take beyond its drain before it is killed.
_STOP_S = 10.0
#: A process that lived for so long was well configured.
_STARTED_S = 3.0


def run_several(config: GatewayConfig, argv: Sequence[str]) -> int:
    """Keep `config.processes` gateways running until SIGTERM or SIGINT, each started with
    `argv` and its own share. Returns the exit status; must run in the main thread."""
    setup_logs("gateway")
    try:
        held, flags = _hold_ports(config)
    except StartupError as error:
        return refuse("gateway", str(error))
    try:
        return asyncio.run(_Processes(config, [*argv, *flags]).run())
    finally:
        for sock in held:
            sock.close()


def _hold_ports(config: GatewayConfig) -> tuple[list[socket.socket], list[str]]:
    """Sockets that keep both ports for this user's processes that share them, and the flags
    that name the ports. Raises StartupError if one is taken."""
    held, flags = [], ["--processes", "1", "--reuse-port"]
    for flag, wanted in (("--http", config.http), ("--grpc", config.grpc)):
        address = ports.check_free(wanted, flag)
        host, port = split_address(address)
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(where)
        held.append(sock)
        flags += [flag, address]
    return held, flags


class _Processes:
    def __init__(self, config: GatewayConfig, flags: Sequence[str]) -> None:
        self._config = config
        self._flags = flags
        self._policy = policy.RestartPolicy()
        self._stop = asyncio.Event()
        self._status = 0
        # Each would overwrite it.
        self._environment = {k: v for k, v in os.environ.items() if k != status.VARIABLE}

    async def run(self) -> int:
        """Until a signal, or until one can't start. Returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        status.report(status.READY)
        await asyncio.gather(*map(self._keep, range(self._config.processes)))
        return self._status

    async def _keep(self, index: int) -> None:
        history, served = policy.History(), False
        while not self._stop.is_set():
            began = time.monotonic()
            process, ended = self._start(index)
            code = await self._until_end(process, ended)
            if self._stop.is_set():
                return
            now = time.monotonic()
            if now - began >= _STARTED_S:
                served, history = True, history.ready(began)
            history, verdict = policy.on_death(
                history, code, now, mesh_was_ready=served, policy=self._policy
            )
            how = policy.describe_exit(code)
            if isinstance(verdict, policy.GiveUp):
                log.error("gateway process %d can't start (%s)", index, how)
                self._status = EXIT_CONFIG
                self._stop.set()
                return
            log.warning(
                "gateway process %d died (%s); restarting in %g s", index, how, verdict.delay_s
            )
            try:
                async with asyncio.timeout(verdict.delay_s):
                    await self._stop.wait()
            except TimeoutError:
                pass

    def _start(self, index: int) -> tuple[subprocess.Popen[bytes], asyncio.Future[None]]:
        flags = list(self._flags)
        if self._config.gateway_id:
            flags += ["--gateway-id", f"{self._config.gateway_id}-{index}"]
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", launch.__file__, str(os.getpid())),
                *(sys.executable, "-P", "-m", "services.gateway", *flags),
            ],
            env=self._environment,
            # A Ctrl-C is the parent's to pass on.
            start_new_session=True,
        )
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        pidfd = os.pidfd_open(process.pid)

        def on_exit() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            ended.set_result(None)

        loop.add_reader(pidfd, on_exit)
        log.info("gateway process %d is %d", index, process.pid)
        return process, ended

    async def _until_end(
        self, process: subprocess.Popen[bytes], ended: asyncio.Future[None]
    ) -> int:
        """Wait for its end; when all shall stop, bring it about."""
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((ended, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        if not ended.done():
            process.terminate()
            limit_s = self._config.drain_delay_s + self._config.drain_timeout_s + _STOP_S
            await asyncio.wait((ended,), timeout=limit_s)
        if not ended.done():
            log.error("process %d did not stop in %g s; killing it", process.pid, limit_s)
            process.kill()
            await ended
        return process.wait()
