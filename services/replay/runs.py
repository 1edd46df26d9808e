"""Several replays of one trace, in this process or in some, with one progress for all.

It knows no command line and draws nothing. Results come in the order asked for and
do not depend on how many processes ran them.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from services.replay.simulation import SimulationConfig, SimulationResult, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.queues import SimpleQueue
    from multiprocessing.synchronize import Event

    from services.replay.workload import Trace

    #: A run's number, requests that ended, and all there are.
    Progress = Callable[[int, int, int], None]
    News = SimpleQueue[tuple[int, int, int]]

_INTERVAL_S = 0.1


def label(config: SimulationConfig) -> str:
    """Names a run among others."""
    return f"{config.policy} ×{config.speed:g}"


def run_all(
    trace: Trace, configs: Sequence[SimulationConfig], jobs: int, progress: Progress
) -> list[SimulationResult]:
    """A result for each of `configs`, `jobs` of them at a time.

    Raises what `simulate` raises, and StartupError if a process was killed.
    """
    if jobs <= 1 or len(configs) <= 1:
        return [_alone(trace, config, run, progress) for run, config in enumerate(configs)]
    # Spawned, not forked: nothing of this process, threads of libraries among it, is there.
    context = multiprocessing.get_context("spawn")
    news: News = context.SimpleQueue()
    stop = context.Event()
    pool = ProcessPoolExecutor(
        min(jobs, len(configs)), context, initializer=_begin, initargs=(trace, news, stop)
    )
    try:
        futures = [pool.submit(_run, run, config) for run, config in enumerate(configs)]
        _follow(futures, news, len(trace.requests), progress)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise StartupError(
            "a process of the replay was killed, perhaps for memory; try --jobs 1 or --limit"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        news.close()


def _alone(
    trace: Trace, config: SimulationConfig, run: int, progress: Progress
) -> SimulationResult:
    result = simulate(trace, config, lambda ended, of: progress(run, ended, of))
    progress(run, len(trace.requests), len(trace.requests))
    return result


def _follow(
    futures: list[Future[SimulationResult]], news: News, num_requests: int, progress: Progress
) -> None:
    """Pass progress on until all are done or one failed."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, _INTERVAL_S, return_when=FIRST_COMPLETED)
        while not news.empty():
            progress(*news.get())
        for future in done:
            future.result()
            progress(futures.index(future), num_requests, num_requests)


class _Stopped(Exception):
    """Another run failed: nobody wants the result."""


_trace: Trace
_news: News
_stop: Event


def _begin(trace: Trace, news: News, stop: Event) -> None:
    """Runs once in each process."""
    global _trace, _news, _stop
    _trace, _news, _stop = trace, news, stop
    # Ctrl-C goes to all: the first process says what is to be said.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(run: int, config: SimulationConfig) -> SimulationResult:
    said = time.monotonic()

    def progress(ended: int, of: int) -> None:
        nonlocal said
        if _stop.is_set():
            raise _Stopped
        if time.monotonic() - said > _INTERVAL_S:
            said = time.monotonic()
            _news.put((run, ended, of))

    return simulate(_trace, config, progress)
