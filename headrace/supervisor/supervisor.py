"""Starts a mesh's processes, keeps them running, and stops them in order.

One task per process starts it, waits until it serves, waits for its death, and
does what `policy` says. What the mesh is at stands in mesh.json, for `status`,
`down` and whoever waits for a detached `up`. It knows no terminal, no signal
handlers, and of the services only their command lines.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from headrace.registry import redact
from headrace.service import cancel_and_wait
from headrace.supervisor import policy, probe
from headrace.supervisor.process import Child
from headrace.supervisor.state import (
    MAX_LOG_LEN,
    MeshState,
    Phase,
    ProcessPhase,
    ProcessState,
    start_time,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from headrace.supervisor.plan import MeshConfig, ProcessSpec
    from headrace.supervisor.state import StateDir

_HOUSEKEEPING_S = 2.0


class Supervisor:
    """One mesh. `run` it once; `tell` is called with one line for each event."""

    def __init__(
        self,
        config: MeshConfig,
        specs: Sequence[ProcessSpec],
        state: StateDir,
        tell: Callable[[str], None],
        *,
        restart_policy: policy.RestartPolicy | None = None,
    ) -> None:
        self._config = config
        self._state = state
        self._tell = tell
        self._policy = restart_policy or policy.RestartPolicy()
        self._kept = [_Kept(Child(spec, state)) for spec in specs]
        self._phase: Phase = "starting"
        self._error = ""
        self._ready_after_s = 0.0
        self._changed = asyncio.Event()
        self._force = asyncio.Event()

    @property
    def mesh(self) -> MeshState:
        """What the mesh is now."""
        pid = os.getpid()
        return MeshState(
            pid=pid,
            start_time=start_time(pid) or 0,
            phase=self._phase,
            model=self._config.model_name,
            engine=self._config.engine,
            http=self._config.http,
            grpc=self._config.grpc,
            redis=redact(self._config.redis) or "embedded",
            processes=tuple(kept.state() for kept in self._kept),
            error=self._error,
            ready_after_s=self._ready_after_s,
        )

    def force(self) -> None:
        """Don't wait any longer for processes that drain."""
        self._force.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Start everything, keep it running until `stop`, then stop everything.

        Raises StartupError if a process can't start; nothing runs then either.
        """
        housekeeping = asyncio.create_task(self._keep_house())
        try:
            await self._start(stop)
            while not stop.is_set():
                await self._any_change(stop)
        finally:
            self._set_phase("failed" if self._error else "stopping")
            await cancel_and_wait(*(kept.task for kept in self._kept))
            await self._stop()
            await cancel_and_wait(housekeeping)
            if self._error:
                self._write()
            else:
                self._state.clear()

    async def _start(self, stop: asyncio.Event) -> None:
        began = time.monotonic()
        for roles in policy.START_ORDER:
            group = [kept for kept in self._kept if kept.role in roles]
            for kept in group:
                kept.task = asyncio.create_task(self._keep(kept))
                kept.task.add_done_callback(self._on_keeper_done)
            while not all(kept.phase == "ready" for kept in group):
                await self._any_change(stop)
                if stop.is_set():
                    return
        self._ready_after_s = time.monotonic() - began
        self._set_phase("ready")

    async def _any_change(self, stop: asyncio.Event) -> None:
        """Wait until a process changed or `stop`. Raises StartupError if the mesh failed."""
        changed = asyncio.create_task(self._changed.wait())
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((changed, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(changed, stopped)
        self._changed.clear()
        if self._error:
            raise StartupError(self._error)

    async def _keep(self, kept: _Kept) -> None:
        """The life of one process, until it is given up or the task is cancelled."""
        name = kept.child.spec.name
        while True:
            try:
                kept.child.start()
            except OSError as error:
                # No process to be had, or no room for its log: it may pass.
                self._tell(f"{name} can't be started: {error}")
                status = 1
            else:
                self._set(kept, "starting")
                status = await self._until_death(kept)
            self._set(kept, "dead")
            kept.history, verdict = policy.on_death(
                kept.history,
                status,
                time.monotonic(),
                mesh_was_ready=self._phase == "ready",
                policy=self._policy,
            )
            how, log = policy.describe_exit(status), kept.child.log_path
            if isinstance(verdict, policy.GiveUp):
                cause = kept.child.cause() or how
                self._fail(f"{name} can't start: {cause} ({how}; log: {log})")
                return
            self._tell(f"{name} died ({how}); restarting in {verdict.delay_s:g} s; log: {log}")
            await asyncio.sleep(verdict.delay_s)

    async def _until_death(self, kept: _Kept) -> int:
        began = time.monotonic()
        death = asyncio.create_task(kept.child.wait())
        serving = asyncio.create_task(probe.wait_serving(kept.child.spec, kept.child.status_path))
        try:
            await asyncio.wait((death, serving), return_when=asyncio.FIRST_COMPLETED)
            if serving.done() and not death.done():
                serving.result()
                kept.history = kept.history.ready(time.monotonic())
                self._set(kept, "ready")
                if kept.history.restarts:
                    self._tell(f"{kept.child.spec.name} is back, {time.monotonic() - began:.1f} s")
            return await death
        finally:
            await cancel_and_wait(death, serving)

    async def _stop(self) -> None:
        for role, grace_s in policy.STOP_ORDER:
            group = [kept for kept in self._kept if kept.role == role and kept.child.is_running]
            for kept in group:
                kept.child.signal(signal.SIGTERM)
            await asyncio.gather(*(self._stop_one(kept, grace_s) for kept in group))

    async def _stop_one(self, kept: _Kept, grace_s: float) -> None:
        ended = asyncio.create_task(kept.child.wait())
        forced = asyncio.create_task(self._force.wait())
        try:
            await asyncio.wait(
                (ended, forced), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not ended.done():
                if not self._force.is_set():
                    self._tell(f"{kept.child.spec.name} did not stop in {grace_s:g} s; killing it")
                kept.child.kill()
            await ended
        finally:
            await cancel_and_wait(forced, ended)
        self._set(kept, "stopped")

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            for name in ("supervisor", *(kept.child.spec.name for kept in self._kept)):
                self._state.put_log_aside(name, longer_than=MAX_LOG_LEN)

    def _on_keeper_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(f"the supervisor itself failed: {error!r}")

    def _fail(self, error: str) -> None:
        self._error = self._error or error
        self._changed.set()

    def _set(self, kept: _Kept, phase: ProcessPhase) -> None:
        kept.phase = phase
        self._write()
        self._changed.set()

    def _set_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._write()

    def _write(self) -> None:
        try:
            self._state.write(self.mesh)
        except OSError as error:
            # A full disk is no reason to stop serving.
            self._tell(f"can't write {self._state.mesh_file}: {error.strerror}")


class _Kept:
    """A child, and what the supervisor knows of it."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.history = policy.History()
        self.phase: ProcessPhase = "waiting"
        self.task: asyncio.Task[None] | None = None

    @property
    def role(self) -> policy.Role:
        return self.child.spec.role

    def state(self) -> ProcessState:
        return ProcessState(
            name=self.child.spec.name,
            role=self.role,
            address=self.child.spec.address,
            phase=self.phase,
            log=str(self.child.log_path),
            pid=self.child.pid,
            restarts=self.history.restarts,
        )
