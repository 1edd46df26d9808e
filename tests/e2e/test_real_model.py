"""The whole mesh with a real model: sense, reuse, loss of a worker, one trace."""

from __future__ import annotations

import os
import signal
from typing import Any

import openai
import pytest

from tests.e2e.mesh import Mesh, Receiver, wait_for

MODEL = "smollm2-135m"


@pytest.fixture
def client(torch_mesh: Mesh) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{torch_mesh.url}/v1", api_key="none", max_retries=0)


def long_prompt(topic: str, sentences: int = 55) -> str:
    """About 600 tokens that no other test has sent."""
    return " ".join(f"Fact {i} about {topic} is that it is number {i}." for i in range(sentences))


def complete(client: openai.OpenAI, prompt: str, **options: Any) -> Any:
    return client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=8, temperature=0, **options
    )


def cached(response: Any) -> int:
    tokens: int = response.usage.prompt_tokens_details.cached_tokens
    return tokens


def test_it_speaks_english(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=32,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_prompt_sent_twice_is_found_and_a_killed_worker_is_survived(
    torch_mesh: Mesh, client: openai.OpenAI
) -> None:
    prompt = long_prompt("rivers")
    before = {w.worker.worker_id: w.owned_blocks for w in torch_mesh.fleet()}
    first = complete(client, prompt)
    assert first.usage.prompt_tokens >= 600
    assert cached(first) == 0

    def holder() -> str | None:
        grown = [
            w.worker.worker_id
            for w in torch_mesh.fleet()
            if w.owned_blocks >= before[w.worker.worker_id] + 36
        ]
        return grown[0] if grown else None

    owner = wait_for("the router to know the prefix", holder)
    second = complete(client, prompt)
    assert cached(second) >= 576
    assert second.choices[0].text == first.choices[0].text

    os.kill(torch_mesh.pid(owner), signal.SIGKILL)
    third = complete(client, prompt)
    assert third.choices[0].text == first.choices[0].text
    assert cached(third) < 576, "the other worker answered"
    wait_for(
        "the killed worker to be back",
        lambda: len([w for w in torch_mesh.fleet() if w.reachable]) == 2,
        60,
    )


def test_the_second_turn_finds_the_first_answer(torch_mesh: Mesh, client: openai.OpenAI) -> None:
    system = {"role": "system", "content": "You tell stories. " + long_prompt("stories", 10)}
    question = {"role": "user", "content": "Tell me a story about a boat."}
    messages: Any = [system, question]
    first = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=100
    )
    answer = first.choices[0].message.content
    whole = first.usage.prompt_tokens + first.usage.completion_tokens
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]

    def second_turn() -> int | None:
        again = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=2
        )
        return cached(again)

    # The last token's KV is never computed, and a block must be full to be shared.
    assert wait_for("the turn", second_turn) >= (whole - 1) // 16 * 16 - 16
    torch_mesh.wait_idle()


def test_one_request_is_one_trace(
    torch_mesh: Mesh, client: openai.OpenAI, receiver: Receiver
) -> None:
    trace_id, parent_id = os.urandom(16).hex(), os.urandom(8).hex()
    complete(
        client,
        long_prompt("traces", 20),
        extra_headers={"traceparent": f"00-{trace_id}-{parent_id}-01"},
    )
    wanted = {"headrace-gateway", "headrace-tokenizer", "headrace-router", "headrace-worker"}
    wait_for(
        "all services to export",
        lambda: (
            wanted <= {s.service for s in receiver.trace(trace_id)}
            and any(s.parent_id == parent_id for s in receiver.trace(trace_id))
        ),
    )
    spans = receiver.trace(trace_id)
    by_id = {s.span_id: s for s in spans}
    roots = [s for s in spans if s.parent_id == parent_id]
    assert len(roots) == 1
    assert roots[0].service == "headrace-gateway"
    assert "first_token" in roots[0].events
    for span in spans:
        assert span is roots[0] or span.parent_id in by_id, f"{span.name} hangs in the air"
        if span is not roots[0]:
            parent = by_id[span.parent_id]
            slack = 5_000_000  # Stages are rounded to what the engine's clock said.
            assert span.start_ns >= parent.start_ns - slack
    worker = [s for s in spans if s.service == "headrace-worker"]
    names = {s.name for s in worker}
    assert {"queue", "prefill", "decode"} <= names
    top = next(s for s in worker if s.parent_id not in {w.span_id for w in worker})
    assert {s.parent_id for s in worker if s is not top} == {top.span_id}
    assert "first_token" in top.events
