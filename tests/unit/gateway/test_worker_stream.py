"""A session with a worker: nothing lost, nothing twice, whatever happens to its connection."""

from __future__ import annotations

import asyncio
from typing import Any

from opentelemetry.trace import INVALID_SPAN

from headrace.params import SamplingParams
from services.gateway.generation import GenerationRequest
from services.gateway.ids import new_request_id


async def start(mesh: Any, prompt: str = "hello", max_tokens: int = 300, n: int = 1) -> Any:
    sink = mesh.new_sink()
    request = GenerationRequest(
        new_request_id(),
        "bytes",
        prompt=prompt,
        n=n,
        sampling=SamplingParams(max_tokens=max_tokens),
    )
    sink.generation = await mesh.pipeline.start(request, sink, INVALID_SPAN)
    return sink


def expected(mesh: Any, num_tokens: int) -> str:
    return "".join(chr(mesh.letters(position)) for position in range(num_tokens))


async def test_a_broken_connection_is_taken_up_again(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    sink = await start(mesh, n=3)
    for num_tokens in (30, 90, 150):
        await mesh.eventually(lambda enough=num_tokens: len(sink.texts.get(0, "")) > enough)
        worker.cut()
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == dict.fromkeys(range(3), expected(mesh, 300))
    assert worker.num_connections == 4
    assert len(worker.sessions) == 1
    assert len(worker.submissions) == 3


async def test_frames_that_a_broken_connection_swallowed_come_again_once(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    sink = await start(mesh)
    await mesh.eventually(lambda: len(sink.texts.get(0, "")) > 20)
    worker.lose_frames = True
    (session,) = worker.sessions.values()
    before = session.log.last
    await mesh.eventually(lambda: session.log.last > before + 20)
    heard = len(sink.texts[0])
    worker.cut()
    worker.lose_frames = False
    await mesh.eventually(lambda: sink.is_over)
    assert heard < 300
    assert sink.texts == {0: expected(mesh, 300)}
    assert sink.usage.completion_tokens == 300


async def test_frames_that_come_again_are_not_delivered_again(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    worker.repeats_all = True
    sink = await start(mesh)
    for num_tokens in (30, 90):
        await mesh.eventually(lambda enough=num_tokens: len(sink.texts.get(0, "")) > enough)
        worker.cut()
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == {0: expected(mesh, 300)}


async def test_what_a_broken_connection_swallowed_is_sent_again_once(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    first = await start(mesh)
    await mesh.eventually(lambda: first.texts)
    worker.deaf = True
    sinks = [await start(mesh, prompt="x" * 9000, max_tokens=20) for _ in range(3)]
    (stream,) = mesh.pipeline._workers._channels
    await mesh.eventually(lambda: not stream._outbox, "all is sent")
    first.generation.cancel()
    worker.cut()
    await mesh.eventually(lambda: worker.num_connections == 2)
    worker.deaf = False
    # What the second connection was sent while deaf needs a third.
    worker.cut()
    await mesh.eventually(lambda: all(sink.is_over for sink in sinks))
    assert all(sink.texts == {0: expected(mesh, 20)} for sink in sinks)
    assert len(worker.submissions) == 4
    await mesh.eventually(lambda: worker.cancels)


async def test_submissions_made_while_it_is_broken_arrive_once(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    first = await start(mesh)
    await mesh.eventually(lambda: first.texts)
    worker.cut()
    sinks = [await start(mesh, prompt="x" * 9000, max_tokens=20) for _ in range(5)]
    await mesh.eventually(lambda: all(sink.is_over for sink in [first, *sinks]))
    assert all(sink.texts == {0: expected(mesh, 20)} for sink in sinks)
    assert len(worker.submissions) == 6


async def test_frames_are_acknowledged_and_forgotten(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    sink = await start(mesh)
    await mesh.eventually(lambda: sink.is_over)
    (session,) = mesh.workers[0].sessions.values()
    await mesh.eventually(lambda: not session.log.unacknowledged())
    # Far fewer frames back than came: one for 32, or one in 100 ms.
    assert session.log.last >= 300
    numbered = [frame for frame in mesh.workers[0].frames if frame.frame]
    assert len(numbered) == 1


async def test_long_prompts_go_in_chunks_between_short_ones(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    mesh.router.card.context_len = 2_000_000
    mesh.router.announce()
    await mesh.eventually(lambda: mesh.pipeline.models()[0].context_len == 2_000_000)
    long = await start(mesh, prompt="y" * 500_000, max_tokens=3)
    short = await start(mesh, max_tokens=3)
    await mesh.eventually(lambda: long.is_over and short.is_over)
    assert long.texts == short.texts == {0: "abc"}
    by_len = {len(submission.prompt_ids): submission for submission in worker.submissions}
    assert by_len[2_000_000].prompt_ids == b"y\0\0\0" * 500_000
    assert max(frame.ByteSize() for frame in worker.frames) <= 64 << 10
    assert worker.submissions[0] is by_len[20]


async def test_a_cancel_overtakes_the_chunks_of_its_own_prompt(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    mesh.router.card.context_len = 2_000_000
    mesh.router.announce()
    await mesh.eventually(lambda: mesh.pipeline.models()[0].context_len == 2_000_000)
    ready = await start(mesh, max_tokens=1)
    await mesh.eventually(lambda: ready.is_over)
    sink = await start(mesh, prompt="y" * 1_000_000)
    await mesh.eventually(lambda: any(frame.chunks for frame in worker.frames))
    sink.generation.cancel()
    after = await start(mesh, max_tokens=3)
    await mesh.eventually(lambda: after.is_over)
    assert after.texts == {0: "abc"}
    sent = sum(len(chunk.data) for frame in worker.frames for chunk in frame.chunks)
    assert sent < 4_000_000
    assert len(worker.submissions) == 2
    (session,) = worker.sessions.values()
    assert not session.live


async def test_a_cancel_before_anything_was_sent_sends_nothing(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    sink = await start(mesh)
    sink.generation.cancel()
    after = await start(mesh, max_tokens=3)
    await mesh.eventually(lambda: after.is_over)
    assert len(worker.submissions) == 1
    assert worker.cancels == []


async def test_slots_are_small_numbers_used_again(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    for _ in range(3):
        sinks = [await start(mesh, max_tokens=2) for _ in range(4)]
        await mesh.eventually(lambda sinks=sinks: all(sink.is_over for sink in sinks))
    assert {submission.slot for submission in mesh.workers[0].submissions} <= {1, 2, 3, 4}


async def test_an_idle_session_is_closed_and_another_opened_at_need(mesh: Any) -> None:
    await mesh.start(num_workers=1, worker_idle_s=0.5)
    worker = mesh.workers[0]
    sink = await start(mesh, max_tokens=2)
    await mesh.eventually(lambda: sink.is_over)
    pool = mesh.pipeline._workers
    await mesh.eventually(lambda: not pool._channels, "the idle session is closed")
    again = await start(mesh, max_tokens=2)
    await mesh.eventually(lambda: again.is_over)
    assert again.texts == {0: "ab"}
    assert len(worker.sessions) == 2
    assert not mesh.router.failures


async def test_a_quiet_worker_with_heartbeats_is_alive(mesh: Any) -> None:
    await mesh.start(num_workers=1, heartbeat_timeout_s=0.75)
    worker = mesh.workers[0]
    worker.allowance = 5
    sink = await start(mesh, max_tokens=10)
    await mesh.eventually(lambda: len(sink.texts.get(0, "")) == 5)
    loop = asyncio.get_running_loop()
    until = loop.time() + 1.5
    await mesh.eventually(lambda: loop.time() > until)
    worker.allowance = 10
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == {0: expected(mesh, 10)}
    assert worker.num_connections == 1


async def test_a_listener_that_fails_does_not_end_the_others(mesh: Any, caplog: Any) -> None:
    await mesh.start(num_workers=1)
    bad = await start(mesh)
    good = await start(mesh)
    await mesh.eventually(lambda: bad.texts)
    bad.on_delta = None
    await mesh.eventually(lambda: good.is_over and bad.is_over)
    assert good.texts == {0: expected(mesh, 300)}
    assert bad.error is not None
    assert "incident" in caplog.text
