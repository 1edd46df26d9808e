"""Bad input to a whole mesh: a clear error that names the field, and nothing harmed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import grpc
import pytest

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc, types_pb2
from tests.e2e.mesh import Mesh

MODEL = "smollm2-135m"
HELLO = [{"role": "user", "content": "Hello"}]


def post(mesh: Mesh, path: str, body: bytes | dict[str, Any]) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = HTTPConnection(mesh.http, timeout=30)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def chat(**changes: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 4, **changes}
    return {k: v for k, v in body.items() if v != "absent"}


@pytest.fixture(autouse=True)
def _unharmed(sim_mesh: Mesh) -> Iterator[None]:
    yield
    status, answer = post(sim_mesh, "/v1/chat/completions", chat())
    assert status == 200, answer
    sim_mesh.wait_idle()


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (chat(model="nobody"), 404, "model", "nobody"),
        (chat(model="absent"), 400, "model", "model"),
        (chat(messages=[]), 400, "messages", "messages"),
        (chat(messages="Hello"), 400, "messages", "array"),
        (chat(messages=[{"role": "user", "content": 7}]), 400, "messages[0].content", "int"),
        (chat(max_tokens=0), 400, "max_tokens", "1"),
        (chat(max_tokens="many"), 400, "max_tokens", "int"),
        (chat(temperature=-1), 400, "temperature", "-1"),
        (chat(temperature=2.5), 400, "temperature", "2.5"),
        (chat(top_p=0), 400, "top_p", "0"),
        (chat(n=0), 400, "n", "0"),
        (chat(n=1000), 400, "n", "1000"),
        (chat(tempersture=1), 400, "tempersture", "tempersture"),
        (chat(logit_bias={"5": 3}), 400, "logit_bias", "logit_bias"),
        (chat(tools=[{"type": "function"}]), 400, "tools[0].function", "tools"),
        (chat(messages=[{"role": "user", "content": "word " * 9000}]), 400, "messages", "8,192"),
        (b'{"model": "smollm2-135m", "messages": [', 400, None, "JSON"),
        (b"", 400, None, "JSON"),
        (b"[]", 400, None, "object"),
        (b"\xff\xfe", 400, None, "JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_over_http(sim_mesh: Mesh, body: Any, status: int, param: str | None, words: str) -> None:
    got, answer = post(sim_mesh, "/v1/chat/completions", body)
    assert got == status, answer
    error = answer["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert "Traceback" not in error["message"]


def test_a_body_of_ten_megabytes_over_http(sim_mesh: Mesh) -> None:
    status, answer = post(sim_mesh, "/v1/chat/completions", b'{"model": "' + b"x" * 10_000_000)
    assert status == 413
    assert "bytes" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (pb.GenerateRequest(model="nobody", prompt="x"), "NOT_FOUND", "nobody"),
        (pb.GenerateRequest(prompt="x"), "INVALID_ARGUMENT", "model"),
        (pb.GenerateRequest(model=MODEL), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(model=MODEL, chat=pb.Chat()), "INVALID_ARGUMENT", "messages"),
        (
            pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds(ids=[1, 10**6])),
            "INVALID_ARGUMENT",
            "1000000",
        ),
        (
            pb.GenerateRequest(
                model=MODEL, prompt="x", sampling=types_pb2.SamplingParams(max_tokens=0)
            ),
            "INVALID_ARGUMENT",
            "max_tokens",
        ),
        (
            pb.GenerateRequest(
                model=MODEL, prompt="x", sampling=types_pb2.SamplingParams(temperature=3)
            ),
            "INVALID_ARGUMENT",
            "temperature",
        ),
        (pb.GenerateRequest(model=MODEL, prompt="x", n=99), "INVALID_ARGUMENT", "n"),
        (pb.GenerateRequest(model=MODEL, prompt="word " * 9000), "INVALID_ARGUMENT", "8,192"),
    ],
    ids=lambda value: str(value)[:30].replace("\n", " "),
)
def test_over_grpc(sim_mesh: Mesh, request_: Any, code: str, words: str) -> None:
    with grpc.insecure_channel(sim_mesh.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request_, timeout=30))
    error: Any = caught.value
    assert error.code().name == code
    assert words in error.details()


def test_a_message_of_ten_megabytes_over_grpc(sim_mesh: Mesh) -> None:
    with grpc.insecure_channel(sim_mesh.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(model=MODEL, prompt="x" * 10_000_000)))
    error: Any = caught.value
    assert error.code().name == "RESOURCE_EXHAUSTED"
