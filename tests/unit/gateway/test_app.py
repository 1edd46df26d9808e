"""A gateway as a whole: both edges, its start and its end."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import aiohttp
import pytest

from headrace.errors import StartupError
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2
from headrace.v1.inference_pb2_grpc import InferenceServiceStub
from services.gateway.app import Gateway
from services.gateway.config import GatewayConfig


def a_config(**values: Any) -> GatewayConfig:
    edges = {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"}
    return GatewayConfig(tokenizer="127.0.0.1:1", router=("127.0.0.1:1",), **{**edges, **values})


async def test_http_and_grpc_share_the_pipeline(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    base = f"http://127.0.0.1:{mesh.gateway.http_port}"
    body = {"model": "bytes", "prompt": "hello", "max_tokens": 5}
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{base}/health/ready") as response:
            assert response.status == 200
        async with session.post(f"{base}/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200
    assert answer["choices"][0]["text"] == "abcde"
    assert answer["usage"]["prompt_tokens"] == 5


async def test_a_stream_over_http_stops_the_engine_when_its_client_leaves(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    url = f"http://127.0.0.1:{mesh.gateway.http_port}/v1/completions"
    body = {"model": "bytes", "prompt": "hello", "max_tokens": 10_000, "stream": True}
    async with aiohttp.ClientSession() as session:
        response = await session.post(url, json=body)
        line = await response.content.readline()
        assert json.loads(line.removeprefix(b"data: "))["choices"][0]["text"].startswith("a")
        response.close()
    await mesh.eventually(lambda: mesh.workers[0].cancels)
    assert mesh.pipeline.num_running == 0


@pytest.mark.parametrize("edge", ["http", "grpc"])
async def test_a_port_in_use_is_one_clear_line(edge: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        gateway = Gateway(a_config(**{edge: address}))
        with pytest.raises(StartupError, match=f"{address}.*in use") as caught:
            await gateway.start()
        assert "\n" not in str(caught.value)
        await gateway.stop()


async def test_draining_ends_what_runs_and_refuses_what_comes(mesh: Any) -> None:
    await mesh.start(num_workers=1, drain_timeout_s=20.0)
    worker = mesh.workers[0]
    worker.allowance = 2
    stub = InferenceServiceStub(mesh.channel())
    sampling = types_pb2.SamplingParams(max_tokens=10)
    request = pb.GenerateRequest(model="bytes", prompt="hello", sampling=sampling)
    call = stub.Generate(request)
    texts = [(await call.read()).text]
    stopping = asyncio.create_task(mesh.gateway.stop())
    await mesh.eventually(lambda: not mesh.pipeline.is_ready())
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{mesh.gateway.http_port}"
        async with session.get(f"{url}/health/ready") as response:
            assert response.status == 503
        body = {"model": "bytes", "prompt": "hello"}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            assert response.status == 503
    assert not stopping.done()
    worker.allowance = 100
    texts += [response.text async for response in rest_of(call)]
    assert "".join(texts) == "abcdefghij"
    await stopping


async def rest_of(call: Any) -> Any:
    while response := await call.read():
        yield response


async def test_what_takes_longer_than_the_drain_is_told(mesh: Any) -> None:
    await mesh.start(num_workers=1, drain_timeout_s=0.1)
    mesh.workers[0].allowance = 2
    stub = InferenceServiceStub(mesh.channel())
    call = stub.Generate(pb.GenerateRequest(model="bytes", prompt="hello"))
    await call.read()
    await mesh.gateway.stop()
    with pytest.raises(Exception, match="shutting down"):
        [response async for response in rest_of(call)]
