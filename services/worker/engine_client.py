"""The worker's end of the engine process: starts it, talks to it, notices its death.

Outputs are read where the socket's bytes arrive: `on_step` is called from the
event loop's read callback, without a task or a future per step. The process is
started by exec (gRPC must not be forked) and ends with its socket.

It knows sequences by number only, not who wants them.
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
from collections import deque
from typing import TYPE_CHECKING, cast

from headrace import status
from headrace.errors import StartupError, Unavailable
from services.worker import engine_wire as wire
from services.worker.engine import EngineStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.engine import EngineConfig, EngineInfo, StepOutput

#: Steps may wait in the kernel while the loop is busy; beyond this the engine waits.
_SOCKET_LEN = 1 << 20
_EXIT_TIMEOUT_S = 5.0
_POLL_S = 0.02

log = logging.getLogger("headrace.worker")


class EngineClient(asyncio.Protocol):
    """One engine in a process of its own. Every method is for the event loop's thread.

    `on_step(output)` hears every step; it must not raise. Set it before the first
    submission. `died` is done when the process is gone without having been asked,
    with the reason as its result.
    """

    def __init__(self, engine: str, config: EngineConfig) -> None:
        self.on_step: Callable[[StepOutput], None] = _ignore
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.pid = 0
        self.step = 0
        self._start = wire.Start(engine, config)
        self._info: EngineInfo | None = None
        self._started: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._splitter = wire.Splitter()
        self._stats = EngineStats()
        self._closing = False
        # Ids and prompt lengths of what the last stats don't count yet, oldest first.
        self._unseen: deque[tuple[int, int]] = deque()
        self._blocks: deque[tuple[asyncio.Future[object], Callable[[list[int]], object]]] = deque()
        # Sequences in the engine, and when the step that runs now began.
        self._num_sequences = 0
        self._busy_since = 0.0
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> EngineInfo:
        """Start the process and wait until the engine is loaded.

        Raises StartupError with the engine's own words, or if its process dies.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_LEN)
        command = [sys.executable, "-m", "services.worker.engine_process"]
        with theirs:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - asyncio's, in uvloop, forks
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.pid = self._process.pid
        ours.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
        self._watcher = asyncio.create_task(self._watch(), name="engine's end")
        self._send(self._start)
        return await self._started

    def submit(self, request: wire.Submit) -> None:
        """Queue a sequence. Ids must grow. Its tokens and its end come in steps."""
        self._send(request)
        self._unseen.append((request.sequence_id, len(request.prompt_ids) // 4))
        if not self._num_sequences:
            self._busy_since = time.monotonic()
        self._num_sequences += 1

    def cancel(self, sequence_ids: list[int]) -> None:
        """Stop sequences at the next step, which brings their ends."""
        self._send(wire.Cancel(sequence_ids))

    async def read_blocks(self, read: Callable[[list[int]], object]) -> None:
        """Call `read` with the short ids of all cached blocks.

        It is called between two steps: after the `on_step` of all steps that the
        ids reflect, before the next. Raises Unavailable if the engine dies.
        """
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._blocks.append((future, read))
        self._send(wire.ListBlocks())
        await future

    def stats(self) -> EngineStats:
        """The load now: the last step's, and what was submitted since."""
        if not self._unseen:
            return self._stats
        last = self._stats
        return last._replace(
            queued_sequences=last.queued_sequences + len(self._unseen),
            queued_prefill_tokens=last.queued_prefill_tokens
            + sum(length for _, length in self._unseen),
        )

    def step_elapsed_ms(self) -> int:
        """How long the step that runs now has been running; 0 when the engine is idle."""
        if not self._num_sequences:
            return 0
        return int((time.monotonic() - self._busy_since) * 1000)

    async def close(self) -> None:
        """End the process: by closing its socket, then by force."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()
        if self._process is not None and self._info is None:
            # While it loads it does not look at the socket.
            self._process.kill()
        if self._watcher is not None:
            await self._watcher

    def _send(self, command: wire.Command) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.encode(command))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for message in self._splitter.feed(data):
            match wire.decode_reply(message):
                case wire.Stepped(output, last_sequence_id):
                    self._take_step(output, last_sequence_id)
                case wire.Blocks(owned):
                    future, read = self._blocks.popleft()
                    if not future.done():
                        future.set_result(read(owned))
                case wire.Reported(phase, fraction):
                    status.report(phase, fraction)
                case wire.Started(info):
                    self._info = info
                    self._stats = EngineStats(total_blocks=info.total_blocks)
                    if not self._started.done():
                        self._started.set_result(info)
                case wire.StartFailed(text):
                    if not self._started.done():
                        self._started.set_exception(StartupError(text))

    def _take_step(self, output: StepOutput, last_sequence_id: int) -> None:
        self.step = output.step
        self._stats = output.stats
        while self._unseen and self._unseen[0][0] <= last_sequence_id:
            self._unseen.popleft()
        self._num_sequences -= len(output.ends)
        self._busy_since = time.monotonic()
        self.on_step(output)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set_result(None)

    async def _watch(self) -> None:
        await self._lost
        code = await self._exit_status()
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with status {code}"
        for future, _ in self._blocks:
            if not future.done():
                future.set_exception(Unavailable("the engine's process is gone"))
        if self._closing:
            return
        if not self._started.done():
            self._started.set_exception(
                StartupError(f"the engine's process {how} while it was loading; see its log")
            )
        elif self._info is not None:
            log.error("the engine's process %d %s", self.pid, how)
            self.died.set_result(f"the engine's process {how}")

    async def _exit_status(self) -> int:
        assert self._process is not None
        for _ in range(int(_EXIT_TIMEOUT_S / _POLL_S)):
            code = self._process.poll()
            if code is not None:
                return code
            await asyncio.sleep(_POLL_S)
        log.error("the engine's process %d does not end: killing it", self.pid)
        self._process.kill()
        return await asyncio.to_thread(self._process.wait)


def _ignore(output: StepOutput) -> None:
    """Nobody listens yet."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
