"""What a mesh on this machine is, on disk: STATE/mesh.json, logs, and who holds the lock.

    STATE/lock             held by the supervisor as long as it lives
    STATE/mesh.json        MeshState, replaced at every change, removed at the end
    STATE/logs/NAME.log    each process's output; NAME.log.1 is what was before
    STATE/run/NAME.status  what each process does (headrace.status)
    STATE/valkey/          where the embedded Valkey works

It starts and stops nothing.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import msgspec

from headrace.errors import StartupError

Phase = Literal["starting", "ready", "stopping", "failed"]
ProcessPhase = Literal["waiting", "starting", "ready", "dead", "stopped"]

#: A log longer than this is put aside; so is what stood there at the start.
MAX_LOG_LEN = 16 << 20


class ProcessState(msgspec.Struct, frozen=True):
    """One process. `pid` is 0 while it does not run."""

    name: str
    role: str
    address: str
    phase: ProcessPhase
    log: str
    pid: int = 0
    restarts: int = 0


class MeshState(msgspec.Struct, frozen=True):
    """One mesh. `start_time` (clock ticks since boot) tells its pid from a later one's."""

    pid: int
    start_time: int
    phase: Phase
    model: str
    engine: str
    http: str
    grpc: str
    redis: str
    processes: tuple[ProcessState, ...] = ()
    error: str = ""
    ready_after_s: float = 0.0

    def address_of(self, role: str) -> str:
        """Where the first process of `role` listens; empty if there is none."""
        return next((p.address for p in self.processes if p.role == role), "")


@dataclass(frozen=True, slots=True)
class StateDir:
    """The paths of one mesh's state."""

    root: Path

    @property
    def mesh_file(self) -> Path:
        return self.root / "mesh.json"

    def log(self, name: str) -> Path:
        """The log of a process."""
        return self.root / "logs" / f"{name}.log"

    def status(self, name: str) -> Path:
        """The status file of a process."""
        return self.root / "run" / f"{name}.status"

    @property
    def valkey(self) -> Path:
        return self.root / "valkey"

    def create(self) -> None:
        """Make all folders, for this user only. Raises StartupError."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in ("logs", "run", "valkey"):
                (self.root / folder).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StartupError(
                f"can't write to the state directory {self.root}: {error.strerror}; "
                "choose another with --state-dir"
            ) from error

    def lock(self) -> IO[bytes]:
        """Hold this state for as long as the returned file is open, here or in a child that
        inherits it. Raises StartupError if a mesh holds it."""
        file = (self.root / "lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            running = self.read()
            pid = f" (pid {running.pid})" if running else ""
            raise StartupError(
                f"a mesh runs already with the state directory {self.root}{pid}; stop it with "
                "`headrace down`, or give another --state-dir and other ports"
            ) from error
        return file

    def read(self) -> MeshState | None:
        """What the last supervisor wrote, alive or not."""
        try:
            return msgspec.json.decode(self.mesh_file.read_bytes(), type=MeshState)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, state: MeshState) -> None:
        """Replace mesh.json."""
        temporary = self.mesh_file.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
        temporary.replace(self.mesh_file)

    def clear(self) -> None:
        """Remove mesh.json."""
        self.mesh_file.unlink(missing_ok=True)

    def put_log_aside(self, name: str, *, longer_than: int = 0) -> None:
        """Move what a log holds to NAME.log.1, if it holds more than `longer_than` bytes.

        Processes append to the open file, so it is emptied, not replaced.
        """
        path = self.log(name)
        with suppress(FileNotFoundError):
            if path.stat().st_size <= longer_than:
                return
            before = path.with_suffix(".log.1")
            with path.open("r+b") as log, before.open("wb") as aside:
                while data := log.read(1 << 20):
                    aside.write(data)
                log.truncate(0)

    def last_line(self, name: str) -> str:
        """The last line of a process's log that says anything."""
        try:
            with self.log(name).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 4096))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def default_state_dir() -> Path:
    """`$HEADRACE_STATE`, or `headrace` in the user's state folder."""
    if chosen := os.environ.get("HEADRACE_STATE"):
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "headrace"


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in brackets, may hold anything.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def is_running(state: MeshState | None) -> bool:
    """Whether the supervisor that wrote `state` lives."""
    return state is not None and start_time(state.pid) == state.start_time
