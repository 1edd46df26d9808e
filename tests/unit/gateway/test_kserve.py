"""The Open Inference Protocol's edge, by a plain stub over a real channel."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import InvalidArgument, NotFound
from headrace.kserve import inference_pb2 as pb
from headrace.kserve.inference_pb2_grpc import (
    GRPCInferenceServiceServicer,
    GRPCInferenceServiceStub,
)
from services.gateway.kserve import convert, options
from services.gateway.kserve.servicer import KServeServicer
from services.gateway.kserve.tensors import BYTES, Tensor, pack, unpack

Input = pb.ModelInferRequest.InferInputTensor


def text_input(text: str | bytes = "hello") -> Any:
    data = text if isinstance(text, bytes) else text.encode()
    contents = pb.InferTensorContents(bytes_contents=[data])
    return Input(name="text_input", datatype="BYTES", shape=[1], contents=contents)


def parameter(value: Any) -> pb.InferParameter:
    kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return pb.InferParameter(**{kind[type(value)]: value})


def a_request(*inputs: Any, model: str = "bytes", **parameters: Any) -> pb.ModelInferRequest:
    parameters.setdefault("max_tokens", 10)
    return pb.ModelInferRequest(
        model_name=model,
        id="my-id",
        inputs=inputs or [text_input()],
        parameters={name: parameter(value) for name, value in parameters.items()},
    )


def texts(response: Any, name: str = "text_output") -> list[str]:
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == name:
            elements = unpack(name, output.datatype, raw)
            assert list(output.shape) == [len(elements)]
            return [e.decode() if isinstance(e, bytes) else str(e) for e in elements]
    raise AssertionError(f"no {name} among {[o.name for o in response.outputs]}")


def is_final(response: Any) -> bool:
    assert isinstance(response.parameters["triton_final_response"].bool_param, bool)
    return bool(response.parameters["triton_final_response"].bool_param)


def parse(request: pb.ModelInferRequest) -> options.TextRequest:
    return options.parse(convert.request_from_proto(request), "req-1", None)


def test_every_rpc_is_implemented() -> None:
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods:
        assert getattr(KServeServicer, method.name) is not getattr(
            GRPCInferenceServiceServicer, method.name
        )


async def test_readiness_and_metadata(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = GRPCInferenceServiceStub(mesh.channel())
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert (await stub.ServerMetadata(pb.ServerMetadataRequest())).name == "headrace"
    for name, version, ready in (
        ("bytes", "", 1),
        ("bytes", "1", 1),
        ("bytes", "2", 0),
        ("", "", 0),
    ):
        answer = await stub.ModelReady(pb.ModelReadyRequest(name=name, version=version))
        assert answer.ready == bool(ready)
    metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="bytes"))
    assert metadata.versions == ["1"]
    assert "text_input" in [tensor.name for tensor in metadata.inputs]
    assert "text_output" in [tensor.name for tensor in metadata.outputs]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelMetadata(pb.ModelMetadataRequest(name="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_not_ready_without_a_worker(mesh: Any) -> None:
    await mesh.start(num_workers=0)
    stub = GRPCInferenceServiceStub(mesh.channel())
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready


async def test_infer_with_contents_and_with_raw_contents(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = GRPCInferenceServiceStub(mesh.channel())
    response = await stub.ModelInfer(a_request())
    assert texts(response) == ["abcdefghij"]
    assert (response.model_name, response.model_version, response.id) == ("bytes", "1", "my-id")
    assert is_final(response)
    raw = a_request(
        Input(name="text_input", datatype="BYTES", shape=[1, 1]),
        Input(name="max_tokens", datatype="INT32", shape=[1, 1]),
        Input(name="return_finish_reason", datatype="BOOL", shape=[1]),
        Input(name="return_num_input_tokens", datatype="BOOL", shape=[1]),
    )
    raw.outputs.add(name="num_output_tokens")
    raw.raw_input_contents.extend([b"\5\0\0\0hello", struct.pack("<i", 4), b"\1", b"\1"])
    response = await stub.ModelInfer(raw)
    assert texts(response) == ["abcd"]
    assert texts(response, "finish_reason") == ["length"]
    assert texts(response, "num_input_tokens") == ["5"]
    assert texts(response, "num_output_tokens") == ["4"]


async def test_several_sequences_echo_and_token_ids(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = GRPCInferenceServiceStub(mesh.channel())
    response = await stub.ModelInfer(a_request(n=3, max_tokens=2, exclude_input_in_output=False))
    assert texts(response) == ["helloab"] * 3
    contents = pb.InferTensorContents(int_contents=[104, 105])
    ids = Input(name="input_ids", datatype="INT32", shape=[2], contents=contents)
    assert texts(await stub.ModelInfer(a_request(ids, max_tokens=3))) == ["abc"]
    assert mesh.workers[0].submissions[-1].prompt_ids == struct.pack("<2I", 104, 105)


async def test_options_by_all_three_ways_reach_the_worker(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = GRPCInferenceServiceStub(mesh.channel())
    # As vLLM's example client sends them: JSON, with strings for values.
    by_json = json.dumps({"temperature": "0.5", "top_p": 0.9, "max_tokens": "3", "seed": 7})
    await stub.ModelInfer(a_request(sampling_parameters=by_json, max_tokens=2, top_k=-1))
    sampling = mesh.workers[0].submissions[-1].sampling
    assert (sampling.temperature, round(sampling.top_p, 3), sampling.seed) == (0.5, 0.9, 7)
    assert sampling.max_tokens == 2, "a parameter goes before sampling_parameters"
    seven = pb.InferTensorContents(uint64_contents=[9])
    seed = Input(name="random_seed", datatype="UINT64", shape=[1, 1], contents=seven)
    await stub.ModelInfer(a_request(text_input(), seed))
    assert mesh.workers[0].submissions[-1].sampling.seed == 9


async def test_stop_strings_as_a_parameter_a_list_and_a_tensor(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = GRPCInferenceServiceStub(mesh.channel())
    assert texts(await stub.ModelInfer(a_request(stop="d"))) == ["abc"]
    assert texts(await stub.ModelInfer(a_request(stop='["x", "c"]'))) == ["ab"]
    words = pb.InferTensorContents(bytes_contents=[b"z", b"fg"])
    stop = Input(name="stop_words", datatype="BYTES", shape=[1, 2], contents=words)
    assert texts(await stub.ModelInfer(a_request(text_input(), stop))) == ["abcde"]


async def test_a_stream_of_many_responses_and_many_requests(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = GRPCInferenceServiceStub(mesh.channel())
    call = stub.ModelStreamInfer()
    for number, max_tokens in enumerate((40, 5, 20)):
        request = a_request(stream=True, max_tokens=max_tokens, return_num_output_tokens=True)
        request.id = f"id-{number}"
        await call.write(request)
    whole = a_request(max_tokens=3)
    await call.write(whole)
    await call.done_writing()
    answers = [answer async for answer in call]
    assert not any(answer.error_message for answer in answers)
    by_id: dict[str, list[Any]] = {}
    for answer in answers:
        by_id.setdefault(answer.infer_response.id, []).append(answer.infer_response)
    letters = "".join(chr(97 + i % 26) for i in range(40))
    for number, max_tokens in enumerate((40, 5, 20)):
        mine = by_id[f"id-{number}"]
        assert "".join(texts(r)[0] for r in mine) == letters[:max_tokens]
        assert sum(int(texts(r, "num_output_tokens")[0]) for r in mine) == max_tokens
        assert [is_final(r) for r in mine] == [False] * (len(mine) - 1) + [True]
    assert len(by_id["id-0"]) > 5
    assert [texts(r) for r in by_id["my-id"]] == [["abc"]]


async def test_an_empty_final_response_if_asked_for(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = GRPCInferenceServiceStub(mesh.channel())
    request = a_request(stream=True, triton_enable_empty_final_response=True, max_tokens=2)
    answers = [a.infer_response async for a in stub.ModelStreamInfer(iter([request]))]
    assert [is_final(a) for a in answers][-1]
    assert not answers[-1].outputs
    assert not any(is_final(a) for a in answers[:-1])
    assert "".join(texts(a)[0] for a in answers[:-1]) == "ab"


async def test_an_error_in_band_leaves_the_others_on_the_stream(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = GRPCInferenceServiceStub(mesh.channel())
    call = stub.ModelStreamInfer()
    bad = [a_request(stream=True, temperature=9.0), a_request(model="other"), a_request(nonsense=1)]
    for request in bad:
        await call.write(request)
        answer = await call.read()
        assert answer.infer_response.id == "my-id"
        assert answer.error_message
        assert is_final(answer.infer_response)
    assert "nonsense" in answer.error_message
    await call.write(a_request(max_tokens=2))
    assert texts((await call.read()).infer_response) == ["ab"]
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


WRONG: list[tuple[Any, str, str]] = [
    (a_request(model="gpt-9"), "NOT_FOUND", "gpt-9"),
    (pb.ModelInferRequest(model_name="bytes", model_version="3"), "NOT_FOUND", "version 1"),
    (pb.ModelInferRequest(model_name="bytes"), "INVALID_ARGUMENT", "text_input"),
    (a_request(text_input(b"\xff")), "INVALID_ARGUMENT", "text_input is not UTF-8"),
    (a_request(text_input("")), "INVALID_ARGUMENT", "text_input"),
    (a_request(text_input("x" * 20_000)), "INVALID_ARGUMENT", "20000 tokens"),
    (a_request(text_input(), text_input()), "INVALID_ARGUMENT", "'text_input' is given twice"),
    (a_request(stream=True), "INVALID_ARGUMENT", "stream must be false"),
    (a_request(max_tokens=0), "INVALID_ARGUMENT", "max_tokens must be in [1, "),
    (a_request(max_tokens="many"), "INVALID_ARGUMENT", "max_tokens must be an integer"),
    (a_request(temperature=3.0), "INVALID_ARGUMENT", "temperature must be in [0, 2]"),
    (a_request(beam_width=4), "INVALID_ARGUMENT", "parameter 'beam_width' is not known"),
    (a_request(sampling_parameters="{"), "INVALID_ARGUMENT", "sampling_parameters is not valid"),
    (a_request(sampling_parameters='{"k": 1}'), "INVALID_ARGUMENT", "sampling_parameters: k"),
    (
        a_request(Input(name="text_input", datatype="STRING", shape=[1])),
        "INVALID_ARGUMENT",
        "datatype must be one of",
    ),
    (
        a_request(Input(name="text_input", datatype="BYTES", shape=[2])),
        "INVALID_ARGUMENT",
        "'text_input': shape [2] does not fit its 0 elements",
    ),
]


@pytest.mark.parametrize(("request_", "code", "text"), WRONG, ids=[w[2][:30] for w in WRONG])
async def test_bad_requests_name_what_is_wrong(
    mesh: Any, request_: Any, code: str, text: str
) -> None:
    await mesh.start(num_workers=1)
    stub = GRPCInferenceServiceStub(mesh.channel())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request_)
    assert caught.value.code() is grpc.StatusCode[code]
    assert text in caught.value.details()


def test_raw_contents_must_fit_the_inputs() -> None:
    request = a_request(Input(name="text_input", datatype="BYTES", shape=[1]))
    for raw, text in (
        ([b"\5\0\0\0hell"], "end inside element 0"),
        ([b"\5\0"], "end inside element 0"),
        ([b"\1\0\0\0a", b""], "one entry for each of the 1 inputs, not 2"),
    ):
        del request.raw_input_contents[:]
        request.raw_input_contents.extend(raw)
        with pytest.raises(InvalidArgument, match=text):
            parse(request)
    both = a_request()
    both.raw_input_contents.append(b"\1\0\0\0a")
    with pytest.raises(InvalidArgument, match="not both"):
        parse(both)


async def test_a_deadline_and_a_timeout_parameter_end_a_request(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.workers[0].allowance = 1
    stub = GRPCInferenceServiceStub(mesh.channel())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(a_request(timeout=300_000))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await mesh.eventually(lambda: mesh.pipeline.num_running == 0)


async def test_a_stream_that_its_client_leaves_stops_its_engines(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    stub = GRPCInferenceServiceStub(mesh.channel())
    call = stub.ModelStreamInfer()
    for _ in range(3):
        await call.write(a_request(stream=True, max_tokens=10_000))
    await call.read()
    await mesh.eventually(lambda: mesh.pipeline.num_running == 3)
    call.cancel()
    await mesh.eventually(lambda: mesh.pipeline.num_running == 0)


async def test_a_client_that_does_not_read_is_cut(
    mesh: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await mesh.start(num_workers=1, max_client_buffer_len=20_000)
    worker = mesh.workers[0]
    worker.step_s, worker.tokens_per_step, worker.allowance = 0.0, 50, 0
    # What the client's side and the kernel may hold is not ours to bound.
    narrow = [("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0)]
    stub = GRPCInferenceServiceStub(mesh.channel(narrow))
    call = stub.ModelStreamInfer()
    for _ in range(40):
        await call.write(a_request(stream=True, max_tokens=15_000))
    worker.allowance = 1 << 30
    await mesh.eventually(lambda: "reads too slowly" in caplog.text, "the call is cut")
    await mesh.eventually(lambda: mesh.pipeline.num_running == 0)
    with suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "reads too slowly" in await call.details()
    other = GRPCInferenceServiceStub(mesh.channel())
    assert texts(await other.ModelInfer(a_request())) == ["abcdefghij"]


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_bytes_survive_packing(elements: list[bytes]) -> None:
    tensor = Tensor("t", BYTES, (len(elements),), tuple(elements))
    assert unpack("t", BYTES, pack(tensor)) == tuple(elements)


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        request = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        request = a_request(text_input(data))
    for name in ("max_tokens", "sampling_parameters", "stop", "temperature"):
        request.parameters[name].string_param = data.decode("latin-1")
        with suppress(InvalidArgument, NotFound):
            parse(request)
