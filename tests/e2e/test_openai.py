"""OpenAI's own clients, in Python and Node, against a whole mesh.

The sim engine's tokens are a function of those before, and seldom JSON: what a chat
becomes is checked against a completion of the text that its template should make.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from headrace.models.store import models_dir
from tests.e2e.mesh import Mesh, running_mesh

MODEL = "smollm2-135m"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
RENDERED = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
NAMED: Any = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    told = {"HEADRACE_GATEWAY_TOOL_PARSER": f"{MODEL}=hermes"}
    flags = ("--workers", "1", "--engine", "sim")
    with running_mesh(tmp_path_factory.mktemp("openai"), *flags, environment=told) as mesh:
        yield mesh


@pytest.fixture
def client(mesh: Mesh) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def completed(client: openai.OpenAI, prompt: str) -> str:
    """What follows `prompt`, to which nothing is added."""
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=8, extra_body={"add_special_tokens": False}
    )
    return answer.choices[0].text


def test_a_last_message_is_continued(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[*MESSAGES, {"role": "assistant", "content": "Well, I"}],
        max_tokens=8,
        extra_body={"continue_final_message": True},
    )
    expected = completed(client, f"{RENDERED}<|im_start|>assistant\nWell, I")
    # A chat's answer is a text of its own.
    assert (answer.choices[0].message.content or "").strip() == expected.strip()


def test_a_chat_without_the_opening_of_its_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=8,
        extra_body={"add_generation_prompt": False},
    )
    assert answer.choices[0].message.content == completed(client, RENDERED)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_begun(client: openai.OpenAI, stream: bool) -> None:
    """This engine ends no call: all of it stays text, its beginning too."""
    opening = '<tool_call>\n{"name": "add", "arguments": '
    options: Any = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 8,
        "tools": [TOOL],
        "tool_choice": NAMED,
    }
    expected = opening + completed(client, f"{RENDERED}<|im_start|>assistant\n{opening}")
    if stream:
        chunks = [*client.chat.completions.create(stream=True, **options)]
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert chunks[-1].choices[0].finish_reason == "length"
    else:
        answer = client.chat.completions.create(**options)
        text = answer.choices[0].message.content or ""
        assert answer.choices[0].finish_reason == "length"
    assert text == expected


def test_tools_and_their_results_reach_the_template(client: openai.OpenAI) -> None:
    """This template shows roles and contents, and nothing else of a message."""
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages: list[Any] = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, tools=[TOOL]
    )
    expected = completed(
        client,
        f"{RENDERED}<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n"
        "<|im_start|>assistant\n",
    )
    assert answer.choices[0].message.content == expected


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=3, n=2
    )
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    for choice in answer.choices:
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert len(entries) == 6
        spelled = b"".join(bytes(entry.bytes or ()) for entry in entries)
        assert spelled.decode() == choice.message.content
        assert all(len(entry.top_logprobs) == 3 for entry in entries)


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": "The mill", "max_tokens": 6, "logprobs": 2}
    answer = client.completions.create(**options)
    Completion.model_validate(answer.model_dump(), strict=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    tokens, offsets = logprobs.tokens or [], logprobs.text_offset or []
    assert "".join(tokens) == answer.choices[0].text
    for token, offset in zip(tokens, offsets, strict=True):
        assert answer.choices[0].text[offset:].startswith(token)
    streamed: list[str] = []
    for chunk in client.completions.create(stream=True, **options):
        for choice in chunk.choices:
            streamed += (choice.logprobs and choice.logprobs.tokens) or []
    assert streamed == tokens


def test_several_prompts_echoed(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["The mill", [504, 4541]], echo=True, max_tokens=3, n=2
    )
    assert len(answer.choices) == 4
    assert answer.choices[0].text == answer.choices[1].text
    assert answer.choices[0].text.startswith("The mill")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"extra_body": {"bad_words": ["mill"]}}, "bad_words"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "x" * 400_000}]}, "messages"),
    ],
)
def test_what_this_engine_has_not_is_refused_by_name(
    client: openai.OpenAI, options: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **options})
    assert caught.value.param == param


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """A folder with npm's `openai`, installed once beside the models."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    folder = models_dir().parent / "node-openai"
    if not (folder / "node_modules" / "openai" / "package.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "openai@6"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        if done.returncode:
            pytest.skip(f"npm could not install openai: {done.stderr[-200:]}")
    return folder


def test_the_node_client(mesh: Mesh, node_modules: Path) -> None:
    script = Path(__file__).with_name("openai_client.mjs")
    done = subprocess.run(
        ["node", str(script), str(node_modules), f"{mesh.url}/v1", MODEL],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"] == found["streamed"]
    assert found["numLogprobs"] == found["usage"]["completion_tokens"] == 12
    assert found["several"] == 4
    assert found["finish"] == "length"
    assert found["bad"] == {"kind": "BadRequestError", "status": 400, "param": "temperature"}
    assert found["unknown"] == {"kind": "NotFoundError", "status": 404, "param": "model"}
    assert found["models"] == [MODEL]
