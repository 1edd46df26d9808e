"""The edges of a whole mesh: other languages, health, clients that leave, workers that die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc, types_pb2
from tests.e2e.mesh import Mesh, wait_for

MODEL = "smollm2-135m"
BUF = str(Path(sys.executable).parent / "buf")


def generate(mesh: Mesh, prompt: str, max_tokens: int, on_response: Any = None) -> list[int]:
    """Token ids of one greedy completion over gRPC."""
    request = pb.GenerateRequest(
        model=MODEL,
        prompt=prompt,
        sampling=types_pb2.SamplingParams(max_tokens=max_tokens, temperature=0),
    )
    ids: list[int] = []
    with grpc.insecure_channel(mesh.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        for response in stub.Generate(request, timeout=60):
            ids += response.token_ids
            if on_response is not None:
                on_response(ids)
    return ids


def test_a_client_in_another_language_by_reflection(sim_mesh: Mesh) -> None:
    """buf is written in Go, and knows our protos from the server alone."""
    done = subprocess.run(
        [
            BUF,
            "curl",
            "--protocol",
            "grpc",
            "--http2-prior-knowledge",
            "-d",
            json.dumps({"model": MODEL, "prompt": "Hello", "sampling": {"maxTokens": 5}}),
            f"http://{sim_mesh.grpc}/headrace.v1.InferenceService/Generate",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    decoder, at, responses = json.JSONDecoder(), 0, []
    text = done.stdout.strip()
    while at < len(text):
        response, at = decoder.raw_decode(text, at)
        at += len(text[at:]) - len(text[at:].lstrip())
        responses.append(response)
    assert sum(len(r.get("tokenIds", [])) for r in responses) == 5
    assert responses[-1]["usage"]["completionTokens"] == 5


def test_the_same_over_http_and_grpc(sim_mesh: Mesh) -> None:
    client = openai.OpenAI(base_url=f"{sim_mesh.url}/v1", api_key="none")
    over_http = client.completions.create(model=MODEL, prompt="Same?", max_tokens=12, temperature=0)
    with grpc.insecure_channel(sim_mesh.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(
            model=MODEL,
            prompt="Same?",
            sampling=types_pb2.SamplingParams(max_tokens=12, temperature=0),
        )
        over_grpc = list(stub.Generate(request, timeout=30))
    assert over_http.choices[0].text == "".join(r.text for r in over_grpc)
    assert over_grpc[-1].usage.prompt_tokens == over_http.usage.prompt_tokens
    assert over_grpc[-1].finish_reason == types_pb2.FINISH_REASON_LENGTH


def test_streaming_says_the_same(sim_mesh: Mesh) -> None:
    client = openai.OpenAI(base_url=f"{sim_mesh.url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "Name three colours."}]
    options: Any = {"model": MODEL, "messages": messages, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    parts, usage = [], None
    for chunk in client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **options
    ):
        parts += [c.delta.content or "" for c in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(parts) == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 24


def test_models_and_health(sim_mesh: Mesh) -> None:
    client = openai.OpenAI(base_url=f"{sim_mesh.url}/v1", api_key="none")
    assert [m.id for m in client.models.list()] == [MODEL]
    for path in ("/health/live", "/health/ready"):
        with urllib.request.urlopen(sim_mesh.url + path, timeout=10) as response:
            assert response.status == 200
    with grpc.insecure_channel(sim_mesh.grpc) as channel:
        inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        models = inference.ListModels(pb.ListModelsRequest(), timeout=10).models
        assert [(m.card.name, m.num_workers) for m in models] == [(MODEL, 2)]
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "headrace.v1.InferenceService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_client_that_leaves_stops_its_engine(sim_mesh: Mesh) -> None:
    body = json.dumps(
        {"model": MODEL, "prompt": "Leaving", "max_tokens": 8000, "stream": True}
    ).encode()
    host, _, port = sim_mesh.http.rpartition(":")
    client = socket.create_connection((host, int(port)), timeout=30)
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    received = b""
    while b"data: " not in received:
        received += client.recv(65536)
    assert sum(w.active_sequences for w in sim_mesh.fleet()) == 1
    client.close()
    sim_mesh.wait_idle()


def test_a_worker_killed_mid_stream_is_not_noticed_by_its_client(sim_mesh: Mesh) -> None:
    """The sim engine's tokens are a function of those before: what resumes can be compared."""
    undisturbed = generate(sim_mesh, "Will it go on?", 300)
    assert len(undisturbed) == 300
    killed: list[str] = []

    def kill_once(ids: list[int]) -> None:
        if len(ids) >= 20 and not killed:
            busy = wait_for(
                "the busy worker",
                lambda: [w.worker.worker_id for w in sim_mesh.fleet() if w.reservations],
            )
            killed.append(busy[0])
            os.kill(sim_mesh.pid(busy[0]), signal.SIGKILL)

    assert generate(sim_mesh, "Will it go on?", 300, kill_once) == undisturbed
    assert killed
    wait_for(
        "the killed worker to be back",
        lambda: len([w for w in sim_mesh.fleet() if w.reachable]) == 2,
        60,
    )
    sim_mesh.wait_idle()


def test_many_clients_at_once(sim_mesh: Mesh) -> None:
    answers: dict[int, list[int]] = {}

    def one(number: int) -> None:
        answers[number] = generate(sim_mesh, f"Client {number % 5}", 40)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 20
    for number, ids in answers.items():
        assert len(ids) == 40
        assert ids == answers[number % 5]
    sim_mesh.wait_idle()


def test_unknown_paths_are_answered_as_openai_does(sim_mesh: Mesh) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{sim_mesh.url}/v1/nothing", timeout=10)
    with caught.value as error:
        assert error.code == 404
        assert json.loads(error.read())["error"]["message"]
