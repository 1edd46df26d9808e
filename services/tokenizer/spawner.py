"""The pool's handle on the process that loads vocabularies and forks workers.

`subprocess.Popen` starts it: forking ourselves after gRPC is loaded is unsafe, and
uvloop's way of starting processes forks too. See pool_process for its side.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec

from headrace.errors import StartupError
from services.tokenizer import work
from services.tokenizer.pool_process import MAX_CONTROL_LEN, SPAWN, SPAWN_YIELDING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_STOP_TIMEOUT_S = 5


class Spawner:
    """One spawner process. `start` it once; `on_exit` is called if it dies."""

    def __init__(self, setup: work.Setup, on_exit: Callable[[], None]) -> None:
        self._setup = setup
        self._on_exit = on_exit
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._started: asyncio.Future[work.Started] | None = None

    @property
    def pid(self) -> int:
        """The process's id; 0 before `start`."""
        return self._process.pid if self._process else 0

    async def start(self) -> Sequence[work.Info]:
        """Start the process and wait until it has loaded. Raises StartupError."""
        loop = asyncio.get_running_loop()
        self._started = loop.create_future()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = _open_process(theirs.fileno())
        self._control.setblocking(False)
        loop.add_reader(self._control, self._receive)
        self._control.send(msgspec.msgpack.encode(self._setup))
        started = await self._started
        if started.fault:
            raise StartupError(started.fault)
        return started.infos

    def spawn(self, *, yields: bool = False) -> socket.socket:
        """Fork a worker; returns our end of its socket, which ends if that fails.

        One that `yields` lets others have the processor first.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                if self._control is not None:
                    socket.send_fds(
                        self._control, [SPAWN_YIELDING if yields else SPAWN], [theirs.fileno()]
                    )
            except OSError:
                # It is dead or dying: the socket's end says so.
                pass
        ours.setblocking(False)
        return ours

    async def close(self) -> None:
        """End the process and its workers, and wait until it is gone."""
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        if self._process is not None:
            await asyncio.to_thread(_reap, self._process)

    def _receive(self) -> None:
        assert self._control is not None
        assert self._started is not None
        try:
            message = self._control.recv(MAX_CONTROL_LEN)
        except BlockingIOError:
            return
        except ConnectionError:
            message = b""
        if message and not self._started.done():
            self._started.set_result(msgspec.msgpack.decode(message, type=work.Started))
            return
        asyncio.get_running_loop().remove_reader(self._control)
        if self._started.done():
            self._on_exit()
        else:
            fault = "the process that loads vocabularies died while loading: see the log"
            self._started.set_result(work.Started([], fault=fault))


def _open_process(control: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "services.tokenizer.pool_process", str(control)],
        pass_fds=[control],
        stdin=subprocess.DEVNULL,
    )


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
