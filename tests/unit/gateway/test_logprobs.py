"""Log probabilities from a worker's frames to the client, each exactly once."""

from __future__ import annotations

from typing import Any

from opentelemetry.trace import INVALID_SPAN

from headrace.logprobs import unpack
from headrace.params import SamplingParams
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2
from headrace.v1.inference_pb2_grpc import InferenceServiceStub
from services.gateway.generation import GenerationRequest
from services.gateway.ids import new_request_id

from .fake_worker import letters, scores

PROMPT = "hello " * 4


async def start(mesh: Any, max_tokens: int = 60, **sampling: Any) -> Any:
    sink = mesh.new_sink()
    params = SamplingParams(max_tokens=max_tokens, seed=5, **sampling)
    request = GenerationRequest(
        new_request_id(), "bytes", prompt=PROMPT, sampling=params, n=2, stop=()
    )
    sink.generation = await mesh.pipeline.start(request, sink, INVALID_SPAN)
    return sink


def expected(num_tokens: int, count: int) -> bytes:
    return b"".join(scores(at, letters(at), count) for at in range(num_tokens))


def expected_prompt(count: int) -> bytes:
    return b"".join(scores(at, token, count) for at, token in enumerate(PROMPT.encode()) if at)


async def test_each_token_brings_its_record_through_the_death_of_a_worker(mesh: Any) -> None:
    await mesh.start(num_workers=2)
    first, _ = mesh.workers
    first.tokens_per_step = 3
    sink = await start(mesh, logprobs=2, prompt_logprobs=1)
    await mesh.eventually(lambda: len(sink.texts.get(1, "")) > 20)
    await first.kill()
    await mesh.eventually(lambda: sink.is_over)
    assert sink.error is None
    assert sink.logprobs == dict.fromkeys(range(2), expected(60, 2))
    assert sink.prompt_logprobs == dict.fromkeys(range(2), expected_prompt(1))


async def test_a_prompt_scored_in_part_is_not_begun_again_for_the_client(mesh: Any) -> None:
    await mesh.start(num_workers=2)
    first, second = mesh.workers
    first.max_prompt_scores, first.allowance = 9, 0
    sink = await start(mesh, max_tokens=4, prompt_logprobs=3)
    await mesh.eventually(lambda: len(sink.prompt_logprobs) == 2)
    await first.kill()
    await mesh.eventually(lambda: sink.is_over)
    assert len(second.submissions) == 2
    assert sink.prompt_logprobs == dict.fromkeys(range(2), expected_prompt(3))


async def test_a_broken_connection_repeats_no_record(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    (worker,) = mesh.workers
    worker.repeats_all = True
    sink = await start(mesh, logprobs=0)
    await mesh.eventually(lambda: len(sink.texts.get(1, "")) > 10)
    worker.cut()
    await mesh.eventually(lambda: sink.is_over)
    assert sink.logprobs == dict.fromkeys(range(2), expected(60, 0))


async def test_who_did_not_ask_hears_nothing(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    sink = await start(mesh)
    await mesh.eventually(lambda: sink.is_over)
    assert sink.logprobs == {0: b"", 1: b""}
    assert sink.prompt_logprobs == {}


async def test_a_worker_that_leaves_records_out_does_not_answer_the_client(mesh: Any) -> None:
    await mesh.start(num_workers=2)
    first, second = mesh.workers
    first.sends_scores = False
    sink = await start(mesh, logprobs=1)
    await mesh.eventually(lambda: sink.is_over)
    assert sink.error is None
    assert len(second.submissions) == 2
    assert sink.logprobs == dict.fromkeys(range(2), expected(60, 1))


async def test_a_stop_string_ends_the_records_too(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.workers[0].tokens_per_step = 7
    sampling = types_pb2.SamplingParams(max_tokens=50, logprobs=2, prompt_logprobs=0)
    request = pb.GenerateRequest(model="bytes", prompt=PROMPT, sampling=sampling, stop=["lm"])
    stub = InferenceServiceStub(mesh.channel())
    responses = [response async for response in stub.Generate(request)]
    found = [record for response in responses for record in response.logprobs]
    wanted = unpack(expected(13, 2), 2)
    assert [i for r in responses for i in r.token_ids] == [record.chosen[0] for record in wanted]
    assert [
        ((r.chosen.token_id, r.chosen.logprob), [(t.token_id, t.logprob) for t in r.top])
        for r in found
    ] == wanted
    prompt = [record for response in responses for record in response.prompt_logprobs]
    assert [r.chosen.token_id for r in prompt] == list(PROMPT.encode()[1:])
    assert not any(r.top for r in prompt)


async def test_a_lost_sequence_that_was_complete_is_not_asked_for_more(mesh: Any) -> None:
    """Its last tokens are a stop sequence; the worker died before it said so."""
    await mesh.start(num_workers=2)
    first, second = mesh.workers
    first.allowance = 6
    sink = await start(mesh, stop_token_sequences=((1, 2), tuple(b"def")))
    await mesh.eventually(lambda: len(sink.texts.get(1, "")) == 6)
    await first.kill()
    await mesh.eventually(lambda: sink.is_over)
    assert sink.reasons == {0: "stop", 1: "stop"}
    assert not second.submissions
