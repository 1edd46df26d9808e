"""One child process: started, watched, signalled, its output in a log.

A child leads a session of its own, so that Ctrl-C in the terminal reaches the
supervisor alone, and so that what it started can be ended with it. It is sent
SIGTERM when the supervisor dies (launch.py). It decides nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from headrace import status

if TYPE_CHECKING:
    from headrace.supervisor.plan import ProcessSpec
    from headrace.supervisor.state import StateDir

_LAUNCH = str(Path(__file__).with_name("launch.py"))


class Child:
    """One process of the mesh, again and again. Use it from the main thread's loop only:
    children are bound to the thread that started them."""

    def __init__(self, spec: ProcessSpec, state: StateDir) -> None:
        self.spec = spec
        self._state = state
        self._process: subprocess.Popen[bytes] | None = None
        self._exited: asyncio.Future[int] | None = None
        state.put_log_aside(spec.name)

    @property
    def pid(self) -> int:
        """0 while it does not run."""
        return self._process.pid if self._process and self.is_running else 0

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._exited is not None and not self._exited.done()

    @property
    def log_path(self) -> Path:
        """Where its output goes."""
        return self._state.log(self.spec.name)

    @property
    def status_path(self) -> Path:
        """Where it says what it does."""
        return self._state.status(self.spec.name)

    def start(self) -> None:
        """Start it. It must not be running."""
        status_file = self._state.status(self.spec.name)
        status_file.unlink(missing_ok=True)
        environment = {**os.environ, **self.spec.environment, status.VARIABLE: str(status_file)}
        # Isolated and without site-packages: it starts in 20 ms.
        launcher = (sys.executable, "-I", "-S", _LAUNCH, str(os.getpid()))
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*launcher, *self.spec.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        loop = asyncio.get_running_loop()
        self._exited = loop.create_future()
        pidfd = os.pidfd_open(self._process.pid)
        loop.add_reader(pidfd, self._on_exit, pidfd)

    async def wait(self) -> int:
        """Its exit status once it ends; negative: by that signal. It must have been started."""
        assert self._exited is not None
        return await asyncio.shield(self._exited)

    def signal(self, number: int) -> None:
        """Signal it; nothing happens if it has ended."""
        if self.is_running and self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it and all that it started, at once."""
        if self.is_running and self._process is not None:
            _kill_group(self._process.pid)

    def cause(self) -> str:
        """Why it could not start, in its own words, or the last that its log says."""
        said = status.read(self._state.status(self.spec.name))
        if said is not None and said.phase.startswith(status.FAILED):
            return said.phase.removeprefix(status.FAILED).lstrip(": ")
        return self._state.last_line(self.spec.name)

    def _on_exit(self, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        assert self._process is not None
        assert self._exited is not None
        # Not yet waited for, it still owns its number: the group is surely its own.
        _kill_group(self._process.pid)
        self._exited.set_result(self._process.wait())


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
