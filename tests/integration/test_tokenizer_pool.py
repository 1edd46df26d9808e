"""The pool: real processes, killed, stopped, poisoned, overloaded."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path

import psutil
import pytest

from headrace.blocks import unpack_tokens
from headrace.errors import (
    DeadlineExceeded,
    HeadraceError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    StartupError,
    Unavailable,
)
from headrace.models.files import ModelFiles
from services.tokenizer.pool import Pool, PoolLimits
from services.tokenizer.tokenizer import Tokenizer
from services.tokenizer.work import EncodeBatch, Encoded, EncodedBatch, EncodeText, Limits
from tests.integration.tokenizer_parts import is_gone, libraries_of, until

TEXTS = [f"Number {i}: {'the river turns the wheel ' * (i % 90)}" for i in range(300)]
#: About a second of work: words that no cache knows.
SLOW = " ".join(f"{i * 7919:x}" for i in range(100_000))


@asynccontextmanager
async def running(smollm2: ModelFiles, limits: PoolLimits | None = None) -> AsyncIterator[Pool]:
    pool = Pool([smollm2], 2, limits)
    try:
        await pool.start()
        yield pool
    finally:
        await pool.close()


def encode(text: str) -> EncodeText:
    return EncodeText("smollm2-135m", text)


async def ids_of(pool: Pool, text: str) -> list[int]:
    answer = (await pool.run(encode(text))).answer
    assert isinstance(answer, Encoded)
    return unpack_tokens(answer.token_ids)


@pytest.fixture(scope="module")
def expected(smollm2: ModelFiles) -> Callable[[str], list[int]]:
    backend = Tokenizer(smollm2).backend
    return lambda text: unpack_tokens(backend.encode(text))


async def test_work_is_done_by_clean_processes_that_share_the_vocabulary(
    smollm2: ModelFiles, expected: Callable[[str], list[int]]
) -> None:
    async with running(smollm2) as pool:
        assert [(i.model, i.vocab_size) for i in pool.infos] == [("smollm2-135m", 49152)]
        assert len({*pool.worker_pids}) == 2
        assert await asyncio.gather(*(ids_of(pool, t) for t in TEXTS)) == [*map(expected, TEXTS)]
        for pid in pool.worker_pids:
            worker = psutil.Process(pid)
            assert worker.ppid() == pool.spawner_pid
            assert worker.num_threads() == 1
            assert "grpc" not in libraries_of(pid)
        # The one that takes what is long lets the other go first.
        niceness = psutil.Process().nice()
        levels = [psutil.Process(pid).nice() for pid in pool.worker_pids]
        assert levels == [niceness, min(19, niceness + 5)]
        pids = [*pool.worker_pids, pool.spawner_pid]
    assert all(map(is_gone, pids))


async def test_killed_processes_lose_nothing(
    smollm2: ModelFiles, expected: Callable[[str], list[int]]
) -> None:
    async with running(smollm2) as pool:
        before = {*pool.worker_pids}
        answers = [asyncio.create_task(ids_of(pool, text)) for text in TEXTS * 10]
        for pid, answered in zip(before, (100, 600), strict=True):
            await until(lambda n=answered: sum(a.done() for a in answers) > n, "some answers")
            assert pool.num_waiting > 100
            os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: pid not in pool.worker_pids, "the death is noticed")
            await until(lambda: len(pool.worker_pids) == 2, "it is replaced")
        assert await asyncio.gather(*answers) == [*map(expected, TEXTS)] * 10
        assert not before & {*pool.worker_pids}
        assert pool.num_waiting == 0


async def test_a_killed_spawner_is_replaced_and_workers_go_on(smollm2: ModelFiles) -> None:
    async with running(smollm2) as pool:
        spawner, workers = pool.spawner_pid, {*pool.worker_pids}
        os.kill(spawner, signal.SIGKILL)
        await until(lambda: pool.spawner_pid not in (0, spawner), "another spawner")
        assert await ids_of(pool, "hello")
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: not workers & {*pool.worker_pids}, "the deaths are noticed")
        assert await ids_of(pool, "hello")
        await until(lambda: len(pool.worker_pids) == 2, "workers from the other spawner")


async def test_a_request_that_kills_its_workers_fails_alone(smollm2: ModelFiles) -> None:
    async with running(smollm2) as pool:
        poison = asyncio.create_task(pool.run(encode(SLOW * 4)))
        for _ in range(2):
            await until(lambda: len(pool.worker_pids) == 2, "both workers live")
            worker = await _busy_worker(pool)
            os.kill(worker, signal.SIGKILL)
            await until(lambda pid=worker: pid not in pool.worker_pids, "the death is noticed")
        with pytest.raises(Internal, match="incident"):
            await poison
        assert await ids_of(pool, "hello")


async def test_a_stopped_process_is_found_and_replaced(smollm2: ModelFiles) -> None:
    async with running(smollm2, PoolLimits(stall_s=1.0)) as pool:
        stopped = {*pool.worker_pids}
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert all(await asyncio.gather(*(ids_of(pool, text) for text in TEXTS[:20])))
        assert not stopped & {*pool.worker_pids}
        await until(lambda: all(map(is_gone, stopped)), "they end")


async def test_what_exceeds_the_queue_is_refused_and_the_rest_done(smollm2: ModelFiles) -> None:
    async with running(smollm2, PoolLimits(max_queued=50)) as pool:
        done = await asyncio.gather(*(ids_of(pool, t) for t in TEXTS[:80]), return_exceptions=True)
        refused = [d for d in done if isinstance(d, ResourceExhausted)]
        assert len(refused) == 30
        assert refused[0].retry_after_ms > 0
        assert sum(isinstance(d, list) for d in done) == 50
    async with running(smollm2, PoolLimits(max_queued_bytes=20_000)) as pool:
        done = await asyncio.gather(
            *(ids_of(pool, "x " * 4000) for _ in range(5)), return_exceptions=True
        )
        assert [isinstance(d, list) for d in done] == [True, True, False, False, False]
        assert "20,000" in str(done[-1])
        assert await ids_of(pool, "one that is longer than the limit, alone " * 900)


async def test_cancelled_and_late_requests_leave_the_queue(smollm2: ModelFiles) -> None:
    async with running(smollm2) as pool:
        for pid in pool.worker_pids:
            os.kill(pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(ids_of(pool, text)) for text in TEXTS[1:200]]
        late = [asyncio.create_task(pool.run(encode("x"), timeout_s=0.05)) for _ in range(50)]
        await until(lambda: pool.num_waiting == 249, "all wait")
        before = pool.load
        for task in tasks:
            task.cancel()
        for error in await asyncio.gather(*late, return_exceptions=True):
            assert isinstance(error, DeadlineExceeded)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert pool.num_waiting == 0
        assert pool.load < before / 2
        for pid in pool.worker_pids:
            os.kill(pid, signal.SIGCONT)
        assert await ids_of(pool, "hello")


async def test_short_requests_pass_long_ones(smollm2: ModelFiles) -> None:
    async with running(smollm2) as pool:
        long = [asyncio.create_task(pool.run(encode(SLOW))) for _ in range(3)]
        await until(lambda: pool.num_waiting == 3, "they wait")
        await asyncio.gather(*(ids_of(pool, text) for text in TEXTS))
        assert not any(task.done() for task in long[1:])
        await asyncio.gather(*long)


async def test_a_burst_of_middling_documents_delays_no_short_one(smollm2: ModelFiles) -> None:
    async with running(smollm2) as pool:
        middling = [SLOW[i * 1000 : i * 1000 + 40_000] for i in range(60)]
        burst = [asyncio.create_task(pool.run(encode(text))) for text in middling]
        for text in TEXTS[:20]:
            await ids_of(pool, text)
        assert sum(task.done() for task in burst) < 40
        await asyncio.gather(*burst)


async def test_a_batch_uses_all_processes_and_keeps_its_order(
    smollm2: ModelFiles, expected: Callable[[str], list[int]]
) -> None:
    texts = [f"{i} {SLOW[i * 90 : i * 90 + 90]}" for i in range(2048)]
    async with running(smollm2) as pool:
        used = {pid: _cpu_s(pid) for pid in pool.worker_pids}
        task = asyncio.create_task(pool.run(_batch(texts)))
        await until(lambda: pool.num_waiting > 10, "it is split")
        short = await ids_of(pool, "short")
        assert short == expected("short")
        assert not task.done()
        answer = (await task).answer
        assert isinstance(answer, EncodedBatch)
        assert unpack_tokens(answer.counts) == [len(expected(text)) for text in texts]
        assert unpack_tokens(answer.token_ids) == [*chain.from_iterable(map(expected, texts))]
        assert all(_cpu_s(pid) > before for pid, before in used.items())
        assert pool.load == 0


async def test_a_batch_survives_a_death_and_fails_as_one(smollm2: ModelFiles) -> None:
    async with running(smollm2) as pool:
        texts = [SLOW[i * 90 : i * 90 + 90] for i in range(2048)]
        task = asyncio.create_task(pool.run(_batch(texts)))
        await until(lambda: pool.num_waiting > 10, "it is split")
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        answer = (await task).answer
        assert isinstance(answer, EncodedBatch)
        assert len(unpack_tokens(answer.counts)) == 2048
        texts[1777] = ""
        with pytest.raises(InvalidArgument, match=r"texts\[1777\] is empty"):
            await pool.run(_batch(texts))
        assert pool.num_waiting == pool.load == 0 or await ids_of(pool, "still well")
        with pytest.raises(InvalidArgument, match="texts is empty"):
            await pool.run(EncodeBatch("smollm2-135m", []))
        with pytest.raises(InvalidArgument, match=r"there are 16,385, the limit is 16,384"):
            await pool.run(EncodeBatch("smollm2-135m", [b"x"] * 16_385))


@pytest.mark.parametrize("late", [False, True], ids=["cancelled", "late"])
async def test_long_work_that_nobody_waits_for_stops(smollm2: ModelFiles, late: bool) -> None:
    """It would take a minute or so."""
    endless = SLOW * 60
    pool = Pool([smollm2], 2, None, Limits(max_text_bytes=1 << 30))
    try:
        await pool.start()
        before = {*pool.worker_pids}
        task = asyncio.create_task(pool.run(encode(endless), timeout_s=0.5 if late else None))
        if not late:
            await _busy_worker(pool)
            task.cancel()
        with pytest.raises(DeadlineExceeded if late else asyncio.CancelledError):
            await task
        await until(lambda: len(before & {*pool.worker_pids}) == 1, "its process ends")
        await until(lambda: len(pool.worker_pids) == 2, "it is replaced")
        gone = before - {*pool.worker_pids}
        await until(lambda: all(map(is_gone, gone)), "it is gone")
        assert await ids_of(pool, SLOW[:100_000])
    finally:
        await pool.close()


async def test_errors_come_back_as_they_are(smollm2: ModelFiles) -> None:
    async with running(smollm2) as pool:
        with pytest.raises(InvalidArgument, match="empty") as caught:
            await pool.run(encode(""))
        assert caught.value.field == "prompt"


async def test_closing_fails_what_waits(smollm2: ModelFiles) -> None:
    pool = Pool([smollm2], 2)
    await pool.start()
    task = asyncio.create_task(pool.run(encode(SLOW)))
    await until(lambda: pool.num_waiting == 1, "it waits")
    pids = [*pool.worker_pids, pool.spawner_pid]
    await pool.close()
    with pytest.raises(Unavailable, match="shutting down"):
        await task
    with pytest.raises(HeadraceError, match="shutting down"):
        await pool.run(encode("x"))
    await until(lambda: all(map(is_gone, pids)), "processes end")


async def test_a_model_that_can_not_be_loaded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF but no more")
    pool = Pool([ModelFiles("bad", "gguf", path)], 2)
    try:
        with pytest.raises(StartupError, match=str(path)):
            await pool.start()
    finally:
        await pool.close()
    assert is_gone(pool.spawner_pid)


PARENT = """
import asyncio, sys
from headrace.models.store import resolve
from services.tokenizer.pool import Pool
from services.tokenizer.work import EncodeText

async def main():
    pool = Pool([resolve("smollm2-135m")], 2)
    await pool.start()
    slow = " ".join(f"{i * 7919:x}" for i in range(900_000))
    task = asyncio.create_task(pool.run(EncodeText("smollm2-135m", slow)))
    await asyncio.sleep(0)
    print(pool.spawner_pid, *pool.worker_pids, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_nothing_outlives_a_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            pids = [*map(int, parent.stdout.readline().split())]
            assert len(pids) == 3
            assert not any(map(is_gone, pids))
            # One that works, and can't see its socket's end.
            os.kill(pids[1], signal.SIGSTOP)
        finally:
            parent.kill()
    asyncio.run(until(lambda: all(map(is_gone, pids)), "the pool's processes end with it"))


def _batch(texts: list[str]) -> EncodeBatch:
    return EncodeBatch("smollm2-135m", [text.encode() for text in texts])


async def _busy_worker(pool: Pool) -> int:
    """The worker that burns processor time."""
    used = {pid: _cpu_s(pid) for pid in pool.worker_pids}
    found: list[int] = []

    def is_found() -> bool:
        found[:] = [pid for pid, before in used.items() if _cpu_s(pid) - before > 0.05]
        return bool(found)

    await until(is_found, "a worker is busy")
    return found[0]


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
