"""How every service's process lives: logs, loop, signals, a clear end.

A service's `__main__` is `read_config` and `run`. This knows nothing of what the
service does.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, TypeVar

import uvloop

from headrace import config, status, telemetry
from headrace.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

#: Exit status of a process that could not start and won't by being restarted.
EXIT_CONFIG = 2

log = logging.getLogger("headrace")


def setup_logs(name: str) -> None:
    """One line per event on stderr; `HEADRACE_LOG` sets the level. Never prompts."""
    level = os.environ.get("HEADRACE_LOG", "INFO").upper()
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format=f"%(asctime)s.%(msecs)03d %(levelname)-7s {name}[%(process)d] %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        force=True,
    )


def read_config(service: str, cls: type[T], description: str) -> T:
    """The configuration from command line, environment and file, or the end of the process."""
    try:
        return config.load(cls, service=service, argv=sys.argv[1:], description=description)
    except StartupError as error:
        raise SystemExit(refuse(service, str(error))) from error


def refuse(service: str, reason: str) -> int:
    """Say why a service can't start, where people and supervisors look. Returns EXIT_CONFIG."""
    setup_logs(service)
    status.report(f"{status.FAILED}: {reason}")
    log.error("%s", reason)
    return EXIT_CONFIG


def run(service: str, instance: str, main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `main` until it returns; SIGTERM and SIGINT set the event it is given.

    `main` starts, waits for the event, drains and returns. Returns the exit
    status: 0, EXIT_CONFIG after a StartupError, 1 after any other failure.
    """
    setup_logs(service)
    telemetry.setup(service, instance)
    try:
        uvloop.run(_until_signal(main))
    except StartupError as error:
        status.report(f"{status.FAILED}: {error}")
        log.error("%s", error)
        return EXIT_CONFIG
    except Exception:
        log.exception("%s failed", service)
        status.report(f"{status.FAILED}: unexpected error, see the log")
        return 1
    finally:
        telemetry.shutdown()
    return 0


async def _until_signal(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await main(stop)


def settle_garbage() -> None:
    """Call when start-up is done: what lives now lives for ever, and is not scanned again."""
    gc.collect()
    gc.freeze()


async def cancel_and_wait(*tasks: asyncio.Task[object] | None) -> None:
    """Cancel `tasks` and wait until they are gone, whatever they raise.

    Again and again if it must: Python 3.11's `wait_for` drops a cancellation that
    arrives as what it waits for finishes, and redis-py wraps its writes in it.
    """
    live = {task for task in tasks if task is not None}
    while live:
        for task in live:
            task.cancel()
        done, live = await asyncio.wait(live, timeout=_CANCEL_AGAIN_S)
        for task in done:
            if not task.cancelled():
                # Looked at, so that it is not reported as forgotten.
                task.exception()


#: How long a task may take to end before it is cancelled once more.
_CANCEL_AGAIN_S = 1.0
