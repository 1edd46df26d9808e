"""The way of a request, over real streams: text, ends, usage, limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry.trace import INVALID_SPAN

from headrace.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from headrace.params import SamplingParams
from services.gateway.generation import ChatMessage, GenerationRequest
from services.gateway.ids import new_request_id


def a_request(prompt: str | None = "hello", **values: Any) -> GenerationRequest:
    sampling = values.pop("sampling", {"max_tokens": 10})
    return GenerationRequest(
        request_id=new_request_id(),
        model=values.pop("model", "bytes"),
        prompt=prompt,
        sampling=SamplingParams(**sampling),
        **values,
    )


async def run(mesh: Any, request: GenerationRequest) -> Any:
    sink = mesh.new_sink()
    await mesh.pipeline.start(request, sink, INVALID_SPAN)
    await mesh.eventually(lambda: sink.is_over, "the request is over")
    return sink


async def test_text_tokens_and_usage_of_one_sequence(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.workers[0].cached_tokens = 3
    sink = await run(mesh, a_request())
    assert sink.texts == {0: "abcdefghij"}
    assert sink.token_ids == {0: list(b"abcdefghij")}
    assert sink.reasons == {0: "length"}
    assert (sink.usage.prompt_tokens, sink.usage.completion_tokens) == (5, 10)
    assert sink.usage.cached_tokens == 3
    (submission,) = mesh.workers[0].submissions
    assert submission.prompt_ids == b"".join(bytes([c, 0, 0, 0]) for c in b"hello")
    assert submission.generated_ids == b""
    assert submission.sampling.HasField("seed")
    assert len(submission.namespace_key) == 16


async def test_sequences_of_one_request_differ_in_seed_and_share_a_reservation(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    sink = await run(mesh, a_request(n=3, sampling={"max_tokens": 4, "seed": 7}))
    assert sink.texts == {0: "abcd", 1: "abcd", 2: "abcd"}
    assert sink.usage.prompt_tokens == 5
    assert sink.usage.completion_tokens == 12
    seeds = {submission.sampling.seed for submission in mesh.workers[0].submissions}
    assert len(seeds) == 3
    assert 7 in seeds
    (call,) = mesh.router.calls
    assert call.select.num_sequences == 3
    await mesh.eventually(lambda: mesh.router.released, "the reservation is released")
    assert mesh.router.released == [call.id]
    assert mesh.router.prefilled == [call.id]


async def test_seeds_are_drawn_anew_for_each_request(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    await run(mesh, a_request())
    await run(mesh, a_request())
    first, second = (s.sampling.seed for s in mesh.workers[0].submissions)
    assert first != second


async def test_chat_and_ready_made_ids_reach_the_tokenizer_as_such(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    await run(mesh, a_request(None, messages=(ChatMessage("user", "hi"),)))
    await run(mesh, a_request(None, token_ids=(104, 105)))
    chat, ids = (call.encode for call in mesh.tokenizer.encodes)
    assert chat.chat.messages[0].content == "hi"
    assert chat.chat.add_generation_prompt
    assert ids.token_ids == bytes([104, 0, 0, 0, 105, 0, 0, 0])


async def test_a_stop_string_across_tokens_and_steps(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    worker.cached_tokens = 4
    sink = await run(mesh, a_request(stop=("fgh", "zz"), sampling={"max_tokens": 10_000}))
    assert sink.texts == {0: "abcde"}
    assert sink.token_ids == {0: list(b"abcdefgh")}
    assert sink.reasons == {0: "stop"}
    assert sink.usage.completion_tokens == 8
    assert sink.usage.cached_tokens == 4
    assert worker.cancels == [worker.submissions[0].slot]


async def test_a_stop_string_in_the_middle_of_a_step(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.workers[0].tokens_per_step = 8
    sink = await run(mesh, a_request(stop=("cd",), sampling={"max_tokens": 10_000}))
    assert sink.texts == {0: "ab"}
    assert sink.token_ids == {0: list(b"abcd")}


async def test_what_may_become_a_stop_string_is_shown_when_it_does_not(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    sink = await run(mesh, a_request(stop=("jk", "ijZ"), sampling={"max_tokens": 10}))
    assert sink.texts == {0: "abcdefghij"}
    assert sink.reasons == {0: "length"}


async def test_end_and_stop_tokens_count_and_are_not_shown(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.workers[0].script = lambda p: mesh.EOS if p == 3 else mesh.letters(p)
    sink = await run(mesh, a_request())
    assert sink.texts == {0: "abc"}
    assert sink.token_ids == {0: [*b"abc", mesh.EOS]}
    assert sink.reasons == {0: "stop"}
    assert sink.usage.completion_tokens == 4
    mesh.workers[0].script = lambda p: mesh.TOOL if p == 2 else mesh.letters(p)
    sampling = {"max_tokens": 10, "stop_token_ids": (mesh.TOOL,)}
    sink = await run(mesh, a_request(sampling=sampling))
    assert sink.texts == {0: "ab"}
    assert sink.usage.completion_tokens == 3


async def test_characters_of_several_tokens_come_whole(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    text = "naïve 😀 漢"
    mesh.workers[0].script = lambda p: text.encode()[p]
    sink = await run(mesh, a_request(sampling={"max_tokens": len(text.encode())}))
    assert sink.texts == {0: text}
    sink = await run(mesh, a_request(sampling={"max_tokens": 3}))
    assert sink.texts == {0: "na\N{REPLACEMENT CHARACTER}"}


async def test_max_tokens_is_what_the_context_leaves(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.router.card.context_len = 12
    mesh.router.announce()
    await mesh.eventually(lambda: mesh.pipeline.models()[0].context_len == 12)
    sink = await run(mesh, a_request(sampling={}))
    assert len(sink.texts[0]) == 7
    sink = await run(mesh, a_request(sampling={"max_tokens": 100}))
    assert len(sink.texts[0]) == 7
    with pytest.raises(InvalidArgument, match=r"12 tokens.*12 tokens"):
        await run(mesh, a_request("x" * 12))
    with pytest.raises(InvalidArgument, match=r"13 tokens.*12 tokens"):
        await run(mesh, a_request(None, token_ids=(1,) * 13))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": None, "messages": ()}, "messages"),
        ({"prompt": None, "token_ids": (258,)}, "token_ids"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stop": ("",)}, "stop[0]"),
        ({"stop": ("a",) * 17}, "stop"),
        ({"sampling": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling": {"temperature": 2.5}}, "temperature"),
        ({"timeout_s": 0.0}, "timeout"),
    ],
)
async def test_bad_requests_name_the_field(mesh: Any, values: Any, field: str) -> None:
    await mesh.start(num_workers=1)
    with pytest.raises(InvalidArgument) as caught:
        await run(mesh, a_request(**{"prompt": "hello", **values}))
    assert caught.value.field == field
    assert not mesh.router.calls


async def test_models_nobody_serves(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    with pytest.raises(NotFound, match="'gpt-9' is not served here; served: bytes"):
        await run(mesh, a_request(model="gpt-9"))
    worker = mesh.workers.pop()
    mesh.router.announce()
    await mesh.eventually(lambda: not mesh.pipeline.is_ready())
    with pytest.raises(Unavailable, match="no worker serves bytes"):
        await run(mesh, a_request())
    await worker.kill()


async def test_a_tokenizer_that_disagrees_with_the_workers_is_refused(mesh: Any) -> None:
    mesh.tokenizer.digest = "another"
    await mesh.start(num_workers=0)
    await mesh.eventually(lambda: mesh.router.opens)
    worker = await mesh.add_worker("late")
    await mesh.eventually(lambda: mesh.tokenizer.num_lists >= 2, "asked and refused")
    with pytest.raises(Unavailable, match="bytes is refused"):
        await run(mesh, a_request())
    assert not mesh.pipeline.models()
    mesh.tokenizer.digest = "digest-of-bytes"
    await mesh.eventually(mesh.pipeline.is_ready)
    assert (await run(mesh, a_request())).texts == {0: "abcdefghij"}
    mesh.tokenizer.digest = "a third"
    with pytest.raises(Unavailable, match="refused"):
        await run(mesh, a_request())
    assert not mesh.pipeline.is_ready()
    assert len(worker.submissions) == 1


async def test_cancel_stops_the_engine_and_frees_everything(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    sink = mesh.new_sink()
    generation = await mesh.pipeline.start(
        a_request(n=2, sampling={"max_tokens": 10_000}), sink, INVALID_SPAN
    )
    await mesh.eventually(lambda: len(sink.texts.get(1, "")) > 5)
    generation.cancel()
    heard = dict(sink.texts)
    generation.cancel()
    await mesh.eventually(lambda: len(worker.cancels) == 2, "both sequences are cancelled")
    await mesh.eventually(lambda: mesh.router.released == [mesh.router.calls[0].id])
    assert mesh.pipeline.num_running == 0
    assert sink.texts == heard
    assert not sink.is_over
    (session,) = worker.sessions.values()
    assert not session.live


async def test_a_caller_cancelled_while_it_waits_leaves_nothing(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.tokenizer.answers.clear()
    start = asyncio.create_task(mesh.pipeline.start(a_request(), mesh.new_sink(), INVALID_SPAN))
    await mesh.eventually(lambda: mesh.tokenizer.encodes)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert mesh.pipeline.num_running == 0
    assert not mesh.router.calls


async def test_deadlines_before_and_after_the_submission(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    worker.allowance = 3
    sink = await run(mesh, a_request(timeout_s=0.5))
    assert isinstance(sink.error, DeadlineExceeded)
    assert sink.texts == {0: "abc"}
    await mesh.eventually(lambda: worker.cancels)
    mesh.tokenizer.answers.clear()
    with pytest.raises(DeadlineExceeded):
        await run(mesh, a_request(timeout_s=0.3))


async def test_requests_at_once_are_bounded(mesh: Any) -> None:
    await mesh.start(num_workers=1, max_requests=2)
    mesh.workers[0].allowance = 1
    sinks = [mesh.new_sink() for _ in range(2)]
    for sink in sinks:
        await mesh.pipeline.start(a_request(), sink, INVALID_SPAN)
    with pytest.raises(ResourceExhausted) as caught:
        await run(mesh, a_request())
    assert caught.value.retry_after_ms
    mesh.workers[0].allowance = 100
    await mesh.eventually(lambda: all(sink.is_over for sink in sinks))
    assert (await run(mesh, a_request())).usage


async def test_the_tokenizer_may_restart_while_requests_wait(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    await mesh.stop_tokenizer()
    await mesh.eventually(lambda: not mesh.pipeline.is_ready())
    waiting = asyncio.create_task(run(mesh, a_request()))
    await mesh.start_tokenizer()
    assert (await waiting).texts == {0: "abcdefghij"}


async def test_without_a_tokenizer_a_request_fails_as_unavailable(mesh: Any) -> None:
    await mesh.start(num_workers=1, tokenizer_timeout_s=0.3)
    await mesh.stop_tokenizer()
    await mesh.eventually(lambda: not mesh.pipeline.is_ready())
    with pytest.raises(Unavailable, match=r"tokenizer .* is not reachable"):
        await run(mesh, a_request())


async def test_frames_that_wait_reach_a_sink_in_one_call(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.workers[0].tokens_per_step = 50
    sink = await run(mesh, a_request(sampling={"max_tokens": 200}))
    assert sink.texts[0] == "".join(chr(mesh.letters(p)) for p in range(200))
    assert sink.num_deltas == 4
