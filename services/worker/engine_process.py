"""The engine's own process: takes commands, steps, sends what came out.

    python -m services.worker.engine_process FD PARENT_PID

The worker starts it and holds the other end of the socket FD. The process ends
when that end closes, so that no engine outlives its worker; signals meant for the
group are the worker's to handle. While the engine has work, commands are taken
between steps; otherwise it sleeps in the socket.

It imports neither gRPC, Redis nor telemetry: an engine step shares its
interpreter with nothing.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from services.worker import engine_wire as wire
from services.worker.engines import create

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engine import Engine

_PR_SET_PDEATHSIG = 1
_RECEIVE_LEN = 1 << 18

log = logging.getLogger("headrace.engine")


class ParentGone(Exception):
    """The worker closed its end, or died."""


class Link:
    """The child's end of the socket, blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._splitter = wire.Splitter()

    def receive(self, *, wait: bool) -> list[wire.Command]:
        """What has arrived; at least some bytes' worth if `wait`. Raises ParentGone."""
        commands: list[wire.Command] = []
        flags = 0 if wait else socket.MSG_DONTWAIT
        while True:
            try:
                data = self._sock.recv(_RECEIVE_LEN, flags)
            except BlockingIOError:
                return commands
            except OSError as error:
                raise ParentGone from error
            if not data:
                raise ParentGone
            commands += map(wire.decode_command, self._splitter.feed(data))
            flags = socket.MSG_DONTWAIT

    def send(self, reply: wire.Reply) -> None:
        """Blocks while the worker takes nothing. Raises ParentGone."""
        try:
            self._sock.sendall(wire.encode(reply))
        except OSError as error:
            raise ParentGone from error


def serve(engine: Engine, link: Link) -> None:
    """Step `engine` as long as the worker is there. Raises ParentGone at its end."""
    last_sequence_id = 0
    while True:
        for command in link.receive(wait=not engine.has_work()):
            match command:
                case wire.Submit():
                    engine.submit([command.request()])
                    last_sequence_id = command.sequence_id
                case wire.Cancel(sequence_ids):
                    engine.cancel(sequence_ids)
                case wire.ListBlocks():
                    link.send(wire.Blocks(engine.owned_blocks()))
                case wire.Start():
                    raise ValueError("the engine has started already")
        if engine.has_work():
            link.send(wire.Stepped(engine.step(), last_sequence_id))


def start(link: Link) -> Engine:
    """Load the engine that the worker names. Raises StartupError, ParentGone."""
    command: wire.Command | None = None
    while command is None:
        command = next(iter(link.receive(wait=True)), None)
    if not isinstance(command, wire.Start):
        raise TypeError(f"{command!r} came before the start")

    def report(phase: str, fraction: float | None) -> None:
        link.send(wire.Reported(phase, fraction))

    return create(command.engine, command.config, report)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 when the worker is gone, 2 if the engine can't start."""
    fd, parent = int(argv[0]), int(argv[1])
    _die_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        level=os.environ.get("HEADRACE_LOG", "INFO").upper(),
        format="%(asctime)s.%(msecs)03d %(levelname)-7s engine[%(process)d] %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
    link = Link(socket.socket(fileno=fd))
    try:
        try:
            engine = start(link)
        except StartupError as error:
            link.send(wire.StartFailed(str(error)))
            return 2
        try:
            # What lives now lives for ever: a collection must not scan it between steps.
            gc.collect()
            gc.freeze()
            link.send(wire.Started(engine.info))
            serve(engine, link)
        finally:
            engine.close()
    except ParentGone:
        return 0
    except Exception:
        log.exception("the engine broke")
        return 1
    return 0


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the worker dies, even while it loads."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
