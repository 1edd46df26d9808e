"""The pool's own processes: one that loads the vocabularies, and its forks that work.

`python -m services.tokenizer.pool_process FD` is the spawner. It is a clean
interpreter with one thread and without gRPC (forking is unsafe with either), loads
once, freezes what it loaded so that forks share the pages, and forks a worker for
each socket that the pool sends it over the control socket FD:

    pool ── Setup ──> spawner        pool <── Started ── spawner
    pool ── SPAWN, a socket ──> spawner ── fork ──> worker <── work ──> pool

A worker answers its socket's requests in order. All end when their socket does:
the pool closes it or dies; the spawner then kills what it forked.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, NoReturn

import msgspec

from headrace.errors import HeadraceError, Internal, StartupError
from headrace.models.files import ModelFiles
from headrace.service import setup_logs
from services.tokenizer import work
from services.tokenizer.service import TokenizerService
from services.tokenizer.tokenizer import load

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("headrace.tokenizer")

#: Longest message on the control socket.
MAX_CONTROL_LEN = 64 << 10
#: Fork a worker; one that does long work lets the others have the processor first.
SPAWN, SPAWN_YIELDING = b"+", b"-"
_NICENESS = 5


def main(control: socket.socket) -> int:
    """Be the spawner until the pool goes away."""
    setup_logs("tokenizer-pool")
    # A terminal's or a supervisor's signal to the whole group must not cut requests
    # off: the pool drains, then closes the sockets.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    setup = msgspec.msgpack.decode(control.recv(MAX_CONTROL_LEN), type=work.Setup)
    models = [ModelFiles(name, form, Path(path)) for name, form, path in setup.models]
    # Nothing of a vocabulary is garbage, and looking for some takes a sixth of its loading.
    gc.disable()
    try:
        tokenizers = load(models)
    except StartupError as error:
        _say(control, work.Started([], fault=str(error)))
        return 0
    service = TokenizerService(tokenizers, setup.limits)
    gc.collect()
    gc.freeze()
    gc.enable()
    _say(control, work.Started([t.info(name) for name, t in tokenizers.items()]))
    _spawn_on_demand(control, service)
    return 0


def _spawn_on_demand(control: socket.socket, service: TokenizerService) -> None:
    children: set[int] = set()

    def reap(_number: int, _frame: object) -> None:
        for pid in list(children):
            if os.waitpid(pid, os.WNOHANG)[0]:
                children.discard(pid)

    # Interrupted system calls go on by themselves.
    signal.signal(signal.SIGCHLD, reap)
    while True:
        message, handles, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            break
        # The child must be known before its end can be noticed.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            control.close()
            if message == SPAWN_YIELDING:
                os.nice(_NICENESS)
            _be_worker(socket.socket(fileno=handles[0]), service.do)
        children.add(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.close(handles[0])
    for pid in list(children):
        os.kill(pid, signal.SIGKILL)


def _be_worker(sock: socket.socket, do: Callable[[work.Work], work.Answer]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    status = 1
    try:
        serve(sock, do)
        status = 0
    except ConnectionError:
        # The pool went away while an answer was under way.
        status = 0
    # The log is the only place that hears of it: the process ends here.
    except BaseException:
        log.exception("worker failed")
    finally:
        # Not back into the spawner's stack.
        os._exit(status)


def serve(sock: socket.socket, do: Callable[[work.Work], work.Answer]) -> None:
    """Answer requests until the other side closes. The first message is our process id."""
    sock.sendall(work.HEADER.pack(work.HEADER_REST_LEN, 0, os.getpid()))
    reader = sock.makefile("rb", buffering=64 << 10)
    while True:
        header = reader.read(work.HEADER.size)
        if len(header) < work.HEADER.size:
            return
        length, request_id, _ = work.HEADER.unpack(header)
        body = reader.read(length - work.HEADER_REST_LEN)
        started = perf_counter_ns()
        answer = answer_of(do, body)
        sock.sendall(work.frame(answer, request_id, perf_counter_ns() - started))


def answer_of(do: Callable[[work.Work], work.Answer], body: bytes) -> work.Answer:
    """The answer to a request, a Failure if it fails."""
    try:
        return do(work.decode_work(body))
    except HeadraceError as error:
        return work.Failure.of(error)
    # Our fault: the request fails with an id for the log, the process goes on.
    except Exception:
        internal = Internal()
        log.exception("incident %s", internal.incident)
        return work.Failure.of(internal)


def _say(control: socket.socket, started: work.Started) -> None:
    control.sendall(msgspec.msgpack.encode(started))


if __name__ == "__main__":
    sys.exit(main(socket.socket(fileno=int(sys.argv[1]))))
