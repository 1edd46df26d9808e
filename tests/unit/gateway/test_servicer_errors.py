"""Errors, batches and nonsense at the gRPC edge: what is on the wire."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2
from headrace.v1.inference_pb2_grpc import InferenceServiceStub


def a_request(max_tokens: int = 4, **values: Any) -> pb.GenerateRequest:
    if not values.keys() & {"prompt", "chat", "token_ids"}:
        values["prompt"] = "hello"
    values.setdefault("model", "bytes")
    values.setdefault("sampling", types_pb2.SamplingParams(max_tokens=max_tokens))
    return pb.GenerateRequest(**values)


async def failure(call: Any) -> tuple[grpc.aio.AioRpcError, dict[str, Any]]:
    """How a call fails, and its details by type."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [r async for r in call]
    status = rpc_status.from_call(caught.value)
    assert status is not None, "every error carries details"
    assert status.code == caught.value.code().value[0]
    details = {}
    for packed in status.details:
        detail = getattr(error_details_pb2, packed.type_url.rpartition(".")[2])()
        assert packed.Unpack(detail)
        details[type(detail).__name__] = detail
    assert details["ErrorInfo"].domain == "headrace"
    assert details["ErrorInfo"].reason == caught.value.code().name
    return caught.value, details


SAMPLING = types_pb2.SamplingParams
BAD_FIELDS = [
    (a_request(sampling=SAMPLING(temperature=9)), "sampling.temperature"),
    (a_request(sampling=SAMPLING(max_tokens=0)), "sampling.max_tokens"),
    (a_request(sampling=SAMPLING(logit_bias={1: 1000})), "sampling.logit_bias[1]"),
    (a_request(sampling=SAMPLING(bad_token_sequences=[{}])), "sampling.bad_token_sequences[0]"),
    (a_request(n=17), "n"),
    (a_request(stop=["ok", ""]), "stop[1]"),
    (a_request(bad_words=[""]), "bad_words[0]"),
    (a_request(priority=101), "priority"),
    (a_request(user="x" * 300), "user"),
    (a_request(session_id="x" * 300), "session_id"),
    (a_request(chat=pb.Chat()), "chat.messages"),
    (a_request(chat=pb.Chat(messages=[pb.Message(content="x")])), "chat.messages[0].role"),
    (a_request(token_ids=pb.TokenIds(ids=[1 << 31])), "token_ids.ids"),
    (pb.GenerateRequest(model="bytes"), "prompt"),
    (a_request(model=""), "model"),
]


@pytest.mark.parametrize(("request_", "field"), BAD_FIELDS, ids=lambda v: str(v)[:20])
async def test_the_field_at_fault_as_the_client_sent_it(
    mesh: Any, request_: Any, field: str
) -> None:
    await mesh.start(num_workers=1)
    error, details = await failure(InferenceServiceStub(mesh.channel()).Generate(request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details["BadRequest"].field_violations
    assert violation.field == field
    assert violation.description == error.details()


async def test_a_limit_is_a_quota_failure_and_says_when(mesh: Any) -> None:
    await mesh.start(num_workers=1, max_requests=1)
    mesh.workers[0].allowance = 1
    stub = InferenceServiceStub(mesh.channel())
    first = stub.Generate(a_request())
    await first.read()
    error, details = await failure(stub.Generate(a_request()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "limit 1" in details["QuotaFailure"].violations[0].description
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 500
    first.cancel()


async def test_other_errors_have_details_too(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = InferenceServiceStub(mesh.channel())
    error, details = await failure(stub.Generate(a_request(model="gpt-9" * 3000)))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert details["ErrorInfo"].metadata["field"] == "model"
    assert len(error.details()) <= 1000, "metadata is bounded, whatever was asked"
    worker = mesh.workers.pop()
    mesh.router.announce()
    await mesh.eventually(lambda: not mesh.pipeline.is_ready())
    error, details = await failure(stub.Generate(a_request()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1000
    mesh.workers.append(worker)


async def test_a_batch_with_one_bad_request(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    requests = [a_request(), a_request(n=99), a_request(2, n=2)]
    stub = InferenceServiceStub(mesh.channel())
    texts: dict[tuple[int, int], str] = {}
    errors, usages = {}, {}
    async for item in stub.GenerateBatch(pb.GenerateBatchRequest(requests=requests)):
        if item.HasField("error"):
            errors[item.request_index] = item.error
            continue
        key = (item.request_index, item.response.index)
        texts[key] = texts.get(key, "") + item.response.text
        if item.response.HasField("usage"):
            usages[item.request_index] = item.response.usage.completion_tokens
    assert texts == {(0, 0): "abcd", (2, 0): "ab", (2, 1): "ab"}
    assert usages == {0: 4, 2: 4}
    assert errors.keys() == {1}
    assert (errors[1].code, errors[1].field) == (3, "requests[1].n")


@pytest.mark.parametrize("count", [0, 257])
async def test_a_batch_is_bounded(mesh: Any, count: int) -> None:
    await mesh.start(num_workers=1)
    stub = InferenceServiceStub(mesh.channel())
    request = pb.GenerateBatchRequest(requests=[a_request()] * count)
    error, details = await failure(stub.GenerateBatch(request))
    assert details["BadRequest"].field_violations[0].field == "requests"
    assert str(count) in error.details()


async def test_a_batch_that_is_left_stops_all_of_it(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = InferenceServiceStub(mesh.channel())
    request = pb.GenerateBatchRequest(requests=[a_request(10_000)] * 5)
    call = stub.GenerateBatch(request)
    await call.read()
    call.cancel()
    await mesh.eventually(lambda: len(mesh.workers[0].cancels) == 5)
    assert mesh.pipeline.num_running == 0


async def test_a_batch_keeps_to_its_client_s_pace(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.workers[0].script = lambda position: mesh.TOOL
    mesh.workers[0].tokens_per_step = 500
    stub = InferenceServiceStub(mesh.channel([("grpc.http2.bdp_probe", 0)]))
    call = stub.GenerateBatch(pb.GenerateBatchRequest(requests=[a_request(10_000)] * 8))
    await call.read()
    await mesh.eventually(lambda: mesh.pipeline.num_running == 0, "all waits in the gateway")
    usages = []
    while (item := await call.read()) is not grpc.aio.EOF:
        if item.response.HasField("usage"):
            usages.append(item.response.usage.completion_tokens)
    assert usages == [10_000] * 8


async def test_embeddings_are_not_served_yet(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = InferenceServiceStub(mesh.channel())

    async def answer(request: pb.EmbedRequest) -> Any:
        yield await stub.Embed(request)

    text = pb.EmbedInput(text="x")
    error, details = await failure(answer(pb.EmbedRequest(model="bytes", inputs=[text])))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "embedding" in error.details()
    assert details["BadRequest"].field_violations[0].field == "model"
    error, _ = await failure(answer(pb.EmbedRequest(model="other", inputs=[text])))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    bad = pb.EmbedRequest(model="bytes", inputs=[text, pb.EmbedInput()])
    _, details = await failure(answer(bad))
    assert details["BadRequest"].field_violations[0].field == "inputs[1]"


async def test_token_texts_beside_logprobs(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    request = a_request(
        2, return_token_texts=True, sampling=SAMPLING(max_tokens=2, logprobs=1, prompt_logprobs=0)
    )
    responses = [r async for r in InferenceServiceStub(mesh.channel()).Generate(request)]
    records = [record for r in responses for record in r.logprobs]
    assert [record.chosen.text for record in records] == [b"a", b"b"]
    assert all(entry.text == bytes([entry.token_id]) for r in records for entry in r.top)
    prompt = [record.chosen for r in responses for record in r.prompt_logprobs]
    assert prompt
    assert all(entry.text for entry in prompt)


METHODS = ["Generate", "GenerateBatch", "Embed", "ListModels"]
#: Truncated, overwritten and padded requests come nearer to the code than noise does.
WHOLE = [a_request(chat=pb.Chat(messages=[pb.Message(role="user", content="hi")], tools_json="["))]
WHOLE += [a_request(token_ids=pb.TokenIds(ids=[1, 2, 3])), a_request(n=2, stop=["x"])]


def bent(source: random.Random) -> bytes:
    """Noise, or a valid request with some bytes changed, cut or both."""
    if source.random() < 0.3:
        return source.randbytes(source.randrange(80))
    request = source.choice(WHOLE)
    if source.random() < 0.5:
        request = pb.GenerateBatchRequest(requests=[request])
    data = bytearray(request.SerializeToString())
    for _ in range(source.randrange(4)):
        data[source.randrange(len(data))] = source.randrange(256)
    return bytes(data[: source.randrange(len(data))] if source.random() < 0.3 else data)


@pytest.mark.parametrize("method", METHODS)
async def test_random_bytes_on_every_rpc(mesh: Any, method: str) -> None:
    await mesh.start(num_workers=1)
    source, channel = random.Random(method), mesh.channel()
    for _ in range(8):
        codes = await asyncio.gather(*(say(channel, method, bent(source)) for _ in range(25)))
        assert not {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN} & set(codes)
    stub = InferenceServiceStub(channel)
    assert [r async for r in stub.Generate(a_request())], "the mesh is unharmed"
    await mesh.eventually(lambda: mesh.pipeline.num_running == 0)


async def say(channel: Any, method: str, data: bytes) -> grpc.StatusCode:
    path = f"/headrace.v1.InferenceService/{method}"
    call = channel.unary_stream(path)(data, timeout=1.0)
    try:
        [r async for r in call]
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
