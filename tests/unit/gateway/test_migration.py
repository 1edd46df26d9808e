"""A sequence whose worker is lost goes on elsewhere; every token is delivered once."""

from __future__ import annotations

from typing import Any

from opentelemetry.trace import INVALID_SPAN

from headrace.blocks import block_ids, unpack_tokens
from headrace.errors import Internal, Unavailable
from headrace.params import SamplingParams
from headrace.v1 import types_pb2
from services.gateway.generation import GenerationRequest
from services.gateway.ids import new_request_id


async def start(mesh: Any, max_tokens: int = 100, **values: Any) -> Any:
    sink = mesh.new_sink()
    sampling = SamplingParams(max_tokens=max_tokens, seed=5)
    request = GenerationRequest(
        new_request_id(), "bytes", prompt="hello " * 10, sampling=sampling, **values
    )
    sink.generation = await mesh.pipeline.start(request, sink, INVALID_SPAN)
    return sink


def expected(mesh: Any, num_tokens: int) -> str:
    return "".join(chr(mesh.letters(position)) for position in range(num_tokens))


async def test_a_killed_worker_s_sequences_go_on_at_another(mesh: Any) -> None:
    await mesh.start(num_workers=2)
    first, second = mesh.workers
    sink = await start(mesh, n=2)
    await mesh.eventually(lambda: len(sink.texts.get(1, "")) > 30)
    await first.kill()
    await mesh.eventually(lambda: sink.is_over)
    assert sink.error is None
    assert sink.texts == dict.fromkeys(range(2), expected(mesh, 100))
    assert sink.usage.completion_tokens == 200
    assert len(second.submissions) == 2
    before = {s.index: s for s in first.submissions}
    for submission in second.submissions:
        generated = unpack_tokens(submission.generated_ids)
        assert 30 < len(generated) < 100
        assert generated == [mesh.letters(position) for position in range(len(generated))]
        assert submission.prompt_ids == before[submission.index].prompt_ids
        assert submission.sampling == before[submission.index].sampling
    (failure,) = mesh.router.failures
    assert (failure.worker_id, failure.generation) == ("w0", 1)


async def test_the_router_is_asked_with_the_blocks_of_prompt_and_answer(mesh: Any) -> None:
    await mesh.start(num_workers=2)
    first, second = mesh.workers
    first.fail_with = types_pb2.Error(code=14, message="draining")
    sink = await start(mesh, max_tokens=40)
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == {0: expected(mesh, 40)}
    asked, asked_again = mesh.router.calls
    assert asked.select.exclude_workers == []
    assert asked_again.select.exclude_workers == ["w0"]
    assert asked_again.select.block_ids == asked.select.block_ids
    assert not mesh.router.failures
    second.allowance = 40
    first.fail_with = None
    moving = await start(mesh)
    await mesh.eventually(lambda: len(moving.texts.get(0, "")) > 20)
    await first.kill()
    await mesh.eventually(lambda: len(second.submissions) == 2)
    (submission,) = second.submissions[1:]
    ids = submission.prompt_ids + submission.generated_ids
    blocks = b"".join(block_ids(ids, 16, submission.namespace_key))
    assert mesh.router.calls[-1].select.block_ids == blocks
    assert mesh.router.calls[-1].select.num_tokens == len(ids) // 4
    second.allowance = 1000
    await mesh.eventually(lambda: moving.is_over)
    released = sorted(mesh.router.released)
    await mesh.eventually(lambda: sorted(mesh.router.released) == [c.id for c in mesh.router.calls])
    assert len(released) == len(set(released)), "each is released once"


async def test_a_worker_that_forgot_the_session_has_lost_its_sequences(mesh: Any) -> None:
    await mesh.start(num_workers=2)
    first, second = mesh.workers
    sink = await start(mesh)
    await mesh.eventually(lambda: len(sink.texts.get(0, "")) > 30)
    first.sessions.clear()
    first.generation = 2
    first.cut()
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == {0: expected(mesh, 100)}
    assert len(second.submissions) == 1
    assert mesh.router.failures[0].generation == 1


async def test_a_silent_worker_is_dead(mesh: Any) -> None:
    await mesh.start(num_workers=2, heartbeat_timeout_s=0.75)
    first, second = mesh.workers
    sink = await start(mesh)
    await mesh.eventually(lambda: len(sink.texts.get(0, "")) > 30)
    first.silent = True
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == {0: expected(mesh, 100)}
    assert len(second.submissions) == 1
    assert "silent" in mesh.router.failures[0].reason
    first.silent = False
    again = await start(mesh, max_tokens=3)
    await mesh.eventually(lambda: again.is_over)
    assert again.texts == {0: "abc"}


async def test_a_worker_that_can_not_be_reached_is_passed_over(mesh: Any) -> None:
    await mesh.start(num_workers=2, worker_connect_timeout_s=0.5)
    await mesh.workers[0].kill()
    sink = await start(mesh)
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == {0: expected(mesh, 100)}


async def test_a_stop_string_across_a_move(mesh: Any) -> None:
    await mesh.start(num_workers=2)
    first, second = mesh.workers
    first.allowance = 8
    sink = await start(mesh, stop=("ghij",))
    await mesh.eventually(lambda: len(sink.token_ids.get(0, [])) == 8)
    assert sink.texts == {0: "abcdef"}
    await first.kill()
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == {0: "abcdef"}
    assert sink.token_ids == {0: list(b"abcdefghij")}
    assert sink.usage.completion_tokens == 10
    assert len(second.submissions) == 1


async def test_a_sequence_that_had_all_its_tokens_only_ends(mesh: Any) -> None:
    await mesh.start(num_workers=2)
    first, second = mesh.workers
    # The end never comes: it is lost with the worker.
    end = first._end
    first._end = lambda slot, reason: end(0, reason)
    sink = await start(mesh, max_tokens=10)
    await mesh.eventually(lambda: len(sink.texts.get(0, "")) == 10)
    assert not sink.is_over
    await first.kill()
    await mesh.eventually(lambda: sink.is_over)
    assert (sink.texts, sink.reasons) == ({0: expected(mesh, 10)}, {0: "length"})
    assert not second.submissions


async def test_a_request_that_kills_workers_is_stopped_after_the_second(mesh: Any) -> None:
    await mesh.start(num_workers=4)
    mesh.workers[0].allowance = 10
    for worker in mesh.workers[1:]:
        worker.allowance = 0
    sink = await start(mesh)
    await mesh.eventually(lambda: len(sink.texts.get(0, "")) == 10)
    await mesh.workers[0].kill()
    await mesh.eventually(lambda: mesh.workers[1].submissions)
    await mesh.workers[1].kill()
    await mesh.eventually(lambda: sink.is_over)
    assert isinstance(sink.error, Internal)
    assert not mesh.workers[2].submissions


async def test_who_made_progress_in_between_is_not_to_blame(mesh: Any) -> None:
    await mesh.start(num_workers=3)
    for worker, allowance in zip(mesh.workers, (10, 20, 1000), strict=True):
        worker.allowance = allowance
    sink = await start(mesh)
    for worker, allowance in list(zip(mesh.workers, (10, 20), strict=False)):
        await mesh.eventually(lambda enough=allowance: len(sink.texts.get(0, "")) == enough)
        await worker.kill()
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == {0: expected(mesh, 100)}


async def test_after_three_workers_it_is_given_up(mesh: Any) -> None:
    await mesh.start(num_workers=4)
    for worker in mesh.workers:
        worker.fail_with = types_pb2.Error(code=14, message="not now")
    sink = await start(mesh)
    await mesh.eventually(lambda: sink.is_over)
    assert isinstance(sink.error, Unavailable)
    assert [len(worker.submissions) for worker in mesh.workers] == [1, 1, 1, 0]


async def test_a_request_the_worker_finds_wrong_does_not_move(mesh: Any) -> None:
    await mesh.start(num_workers=2)
    mesh.workers[0].fail_with = types_pb2.Error(code=3, message="no top_k here", field="top_k")
    sink = await start(mesh)
    await mesh.eventually(lambda: sink.is_over)
    assert sink.error.field == "top_k"
    assert not mesh.workers[1].submissions


async def test_it_waits_for_a_worker_while_there_is_none(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    sink = await start(mesh)
    await mesh.eventually(lambda: len(sink.texts.get(0, "")) > 30)
    await mesh.workers[0].kill()
    calls = len(mesh.router.calls)
    await mesh.eventually(lambda: len(mesh.router.calls) > calls + 1, "it asks and asks")
    assert not sink.is_over
    await mesh.add_worker("new")
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == {0: expected(mesh, 100)}


async def test_its_wait_for_a_worker_ends(mesh: Any) -> None:
    await mesh.start(num_workers=1, worker_wait_s=0.3)
    sink = await start(mesh)
    await mesh.eventually(lambda: sink.texts)
    await mesh.workers[0].kill()
    await mesh.eventually(lambda: sink.is_over)
    assert isinstance(sink.error, Unavailable)


async def test_cancelled_while_it_moves(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    sink = await start(mesh)
    await mesh.eventually(lambda: sink.texts)
    await mesh.workers[0].kill()
    calls = len(mesh.router.calls)
    await mesh.eventually(lambda: len(mesh.router.calls) > calls)
    sink.generation.cancel()
    assert mesh.pipeline.num_running == 0
    assert not sink.is_over
