"""The gRPC edge, by a real client over a real channel."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2
from headrace.v1.inference_pb2_grpc import InferenceServiceStub


def a_request(max_tokens: int = 10, **values: Any) -> pb.GenerateRequest:
    if not values.keys() & {"prompt", "chat", "token_ids"}:
        values["prompt"] = "hello"
    values.setdefault("model", "bytes")
    sampling = types_pb2.SamplingParams(max_tokens=max_tokens)
    return pb.GenerateRequest(sampling=sampling, **values)


async def test_a_stream_of_text_tokens_reasons_and_usage(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.workers[0].cached_tokens = 2
    stub = InferenceServiceStub(mesh.channel())
    responses = [r async for r in stub.Generate(a_request(n=2))]
    for index in range(2):
        mine = [r for r in responses if r.index == index]
        assert "".join(r.text for r in mine) == "abcdefghij"
        assert [i for r in mine for i in r.token_ids] == list(b"abcdefghij")
        reasons = [r.finish_reason for r in mine]
        assert reasons[-1] == types_pb2.FINISH_REASON_LENGTH
        assert not any(reasons[:-1])
    assert [r.HasField("usage") for r in responses] == [False] * (len(responses) - 1) + [True]
    usage = responses[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (5, 20, 2)
    assert len({r.request_id for r in responses}) == 1
    assert responses[0].request_id == mesh.workers[0].submissions[0].request_id


async def test_chat_ids_and_sampling_parameters_get_through(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = InferenceServiceStub(mesh.channel())
    chat = pb.Chat(messages=[pb.Message(role="user", content="hi")])
    sampling = types_pb2.SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=3)
    sampling.max_tokens = 2
    request = pb.GenerateRequest(model="bytes", chat=chat, sampling=sampling)
    assert [r async for r in stub.Generate(request)]
    (submission,) = mesh.workers[0].submissions
    assert submission.sampling == sampling
    request = a_request(token_ids=pb.TokenIds(ids=[1, 2]))
    assert [r async for r in stub.Generate(request)]
    assert mesh.workers[0].submissions[1].prompt_ids == b"\1\0\0\0\2\0\0\0"


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (pb.GenerateRequest(model="bytes"), "INVALID_ARGUMENT", "one of prompt, chat"),
        (a_request(model="gpt-9"), "NOT_FOUND", "'gpt-9' is not served"),
        (a_request(max_tokens=0), "INVALID_ARGUMENT", "max_tokens must be 1 or more, not 0"),
        (a_request(n=0), "INVALID_ARGUMENT", "n must be 1 to 16, not 0"),
        (a_request(chat=pb.Chat()), "INVALID_ARGUMENT", "messages must not be empty"),
        (a_request(stop=[""]), "INVALID_ARGUMENT", "stop[0]"),
        (a_request(prompt="x" * 20_000), "INVALID_ARGUMENT", "20000 tokens"),
    ],
)
async def test_bad_requests(mesh: Any, request_: Any, code: str, text: str) -> None:
    await mesh.start(num_workers=1)
    stub = InferenceServiceStub(mesh.channel())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [r async for r in stub.Generate(request_)]
    assert caught.value.code() is grpc.StatusCode[code]
    assert text in caught.value.details()
    assert [r async for r in stub.Generate(a_request())], "the mesh is unharmed"


async def test_a_client_that_leaves_stops_the_engine(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    stub = InferenceServiceStub(mesh.channel())
    call = stub.Generate(a_request(max_tokens=10_000, n=2))
    await call.read()
    call.cancel()
    await mesh.eventually(lambda: len(worker.cancels) == 2)
    assert mesh.pipeline.num_running == 0


async def test_a_client_that_leaves_before_the_first_token(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.tokenizer.answers.clear()
    call = InferenceServiceStub(mesh.channel()).Generate(a_request())
    reading = asyncio.create_task(call.read())
    await mesh.eventually(lambda: mesh.tokenizer.encodes)
    assert mesh.pipeline.num_running == 1
    call.cancel()
    await mesh.eventually(lambda: mesh.pipeline.num_running == 0)
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_the_client_s_deadline_is_the_request_s(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    worker.allowance = 2
    stub = InferenceServiceStub(mesh.channel())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [r async for r in stub.Generate(a_request(), timeout=0.5)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await mesh.eventually(lambda: worker.cancels)
    assert 0 < worker.submissions[0].timeout_ms <= 500


async def test_a_limit_says_when_to_come_back(mesh: Any) -> None:
    await mesh.start(num_workers=1, max_requests=1)
    mesh.workers[0].allowance = 1
    stub = InferenceServiceStub(mesh.channel())
    first = stub.Generate(a_request())
    await first.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [r async for r in stub.Generate(a_request())]
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "500"
    first.cancel()


async def test_steps_merge_for_a_client_that_reads_slowly(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    worker = mesh.workers[0]
    worker.script = lambda position: mesh.TOOL
    worker.tokens_per_step = 500
    stub = InferenceServiceStub(mesh.channel([("grpc.http2.bdp_probe", 0)]))
    call = stub.Generate(a_request(max_tokens=10_000, n=8))
    await call.read()
    await mesh.eventually(lambda: mesh.pipeline.num_running == 0, "all waits in the gateway")
    responses = [r async for r in rest_of(call)]
    assert sum(len(r.token_ids) for r in responses) > 8 * 9_000
    assert sum(r.usage.completion_tokens for r in responses) == 8 * 10_000
    assert max(len(r.token_ids) for r in responses) > 500


async def rest_of(call: Any) -> Any:
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response


async def test_a_client_that_does_not_read_loses_its_request_not_our_memory(mesh: Any) -> None:
    await mesh.start(num_workers=1, max_client_buffer_len=50_000)
    worker = mesh.workers[0]
    worker.script = lambda position: mesh.TOOL
    worker.tokens_per_step = 50
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    stub = InferenceServiceStub(mesh.channel(options))
    call = stub.Generate(a_request(max_tokens=19_000, n=16))
    await call.read()
    await mesh.eventually(lambda: worker.cancels, "it is stopped")
    await mesh.eventually(lambda: mesh.pipeline.num_running == 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [r async for r in rest_of(call)]
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "reads too slowly" in caught.value.details()


async def test_models_health_and_reflection(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    channel = mesh.channel()
    answer = await InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
    (model,) = answer.models
    assert (model.card.name, model.card.context_len, model.num_workers) == ("bytes", 20_000, 1)
    health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    serving = health_pb2.HealthCheckResponse.SERVING
    await reads(health, serving)
    worker = mesh.workers.pop()
    mesh.router.announce()
    await reads(health, health_pb2.HealthCheckResponse.NOT_SERVING)
    mesh.workers.append(worker)
    mesh.router.announce()
    await reads(health, serving)
    health.cancel()
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([asked])
    )
    names = {s.name for s in (await reflected.read()).list_services_response.service}
    assert "headrace.v1.InferenceService" in names
    reflected.cancel()


async def reads(health: Any, status: Any) -> None:
    async with asyncio.timeout(20):
        while (await health.read()).status != status:
            pass
