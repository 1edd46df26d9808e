"""Clients against a whole mesh: ours, and examples in other languages as users run them."""

from __future__ import annotations

import asyncio
import doctest
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import headrace
from headrace.client import aio, sync
from headrace.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from tests.e2e.mesh import Mesh, free_port

MODEL = "smollm2-135m"
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "clients"
PROMPT = "The mill stands at the river"


@pytest.fixture
def client(sim_mesh: Mesh) -> Any:
    with headrace.Client(sim_mesh.grpc, timeout_s=60) as client:
        yield client


@pytest.mark.parametrize("module", [headrace.client, sync, aio], ids=lambda m: m.__name__)
def test_the_examples_in_docstrings(sim_mesh: Mesh, client: Any, module: Any) -> None:
    names = {**vars(module), "address": sim_mesh.grpc, "client": client, "asyncio": asyncio}
    result = doctest.testmod(module, globs=names, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_same_whole_streamed_batched_and_async(sim_mesh: Mesh, client: Any) -> None:
    options: Any = {"max_tokens": 12, "temperature": 0, "n": 2, "logprobs": 1}
    whole = client.generate(PROMPT, **options)
    assert [len(choice.token_ids) for choice in whole.choices] == [12, 12]
    assert [len(choice.logprobs) for choice in whole.choices] == [12, 12]
    assert whole.usage.completion_tokens == 24
    with client.stream(PROMPT, **options) as stream:
        deltas = list(stream)
    for choice in whole.choices:
        assert "".join(d.text for d in deltas if d.index == choice.index) == choice.text
    (batched,) = client.batch([PROMPT], **options)
    assert [choice.text for choice in batched.choices] == [choice.text for choice in whole.choices]

    async def over_asyncio() -> Any:
        async with headrace.AsyncClient(sim_mesh.grpc, model=MODEL) as client:
            assert (await client.models())[0].num_workers == 2
            batched = await client.batch([PROMPT, ""], **options)
            assert isinstance(batched[1], InvalidArgument)
            return await client.generate(PROMPT, **options), batched[0]

    for answer in asyncio.run(over_asyncio()):
        assert [choice.text for choice in answer.choices] == [c.text for c in whole.choices]


def test_chat_ids_and_template_variables(client: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a river.", "name": "Ann"},
    ]
    answer = client.generate(messages, max_tokens=3, template_args={"a": 1}, tools=[])
    assert len(answer.choices[0].token_ids) == 3
    assert client.generate([504, 1033], max_tokens=2).usage.prompt_tokens == 2
    assert client.generate("x", max_tokens=2, priority=3, user="u", session_id="s").text
    # What an engine can't do is refused by name.
    with pytest.raises(InvalidArgument, match="bad_token_sequences"):
        client.generate("x", bad_words=["river"])


def test_errors_are_typed(sim_mesh: Mesh, client: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.generate("x", temperature=9)
    assert caught.value.field == "sampling.temperature"
    with pytest.raises(NotFound) as missing:
        client.generate("x", model="gpt-9")
    assert missing.value.field == "model"
    with pytest.raises(InvalidArgument, match="embedding"):
        client.embed(["x"])
    with pytest.raises(DeadlineExceeded):
        client.generate("x", max_tokens=8000, timeout_s=0.3)
    sim_mesh.wait_idle()


def test_leaving_a_stream_stops_the_engine(sim_mesh: Mesh, client: Any) -> None:
    for delta in client.stream(PROMPT, max_tokens=8000):
        assert delta.token_ids
        break
    del delta
    sim_mesh.wait_idle()
    with client.stream(PROMPT, max_tokens=8000) as stream:
        next(stream)
    sim_mesh.wait_idle()

    async def leave() -> None:
        async with headrace.AsyncClient(sim_mesh.grpc) as client:
            async with await client.stream(PROMPT, max_tokens=8000) as stream:
                await anext(stream)
            await asyncio.to_thread(sim_mesh.wait_idle)

    asyncio.run(leave())


def test_threads_share_a_client(client: Any) -> None:
    texts: list[str] = []

    def one() -> None:
        texts.append(client.generate(PROMPT, max_tokens=10, temperature=0).text)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(texts) == 8
    assert len(set(texts)) == 1


def test_nobody_there_is_unavailable_after_some_attempts() -> None:
    with (
        headrace.Client(f"127.0.0.1:{free_port()}", timeout_s=10, max_retries=1) as client,
        pytest.raises(Unavailable),
    ):
        client.models()


def run_example(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=100, **options
    )


def check_example(command: list[str], model: list[str], client: Any, **options: Any) -> None:
    """It prints what our own client gets, and says what is wrong with a bad request."""
    done = run_example([*command, *model, PROMPT, "6"], **options)
    assert done.returncode == 0, done.stderr
    assert "+ 6 tokens" in done.stderr
    assert done.stdout.strip()
    refused = run_example([*command, *model, PROMPT, "0"], **options)
    assert refused.returncode == 1
    assert "max_tokens must be 1 or more" in refused.stderr


def test_the_python_example(sim_mesh: Mesh, client: Any) -> None:
    example = str(EXAMPLES / "python" / "generate.py")
    check_example([sys.executable, example, sim_mesh.grpc], [], client)


def test_the_node_example(sim_mesh: Mesh, client: Any, tmp_path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    for name in ("generate.mjs", "package.json"):
        shutil.copy(EXAMPLES / "node" / name, tmp_path)
    installed = run_example([npm, "install", "--silent", "--no-audit", "--no-fund"], cwd=tmp_path)
    if installed.returncode:
        pytest.skip(f"npm can't install @grpc/grpc-js here: {installed.stderr[-200:]}")
    environment = {**os.environ, "HEADRACE_PROTOS": str(ROOT / "protos")}
    command = [node, str(tmp_path / "generate.mjs"), sim_mesh.grpc]
    check_example(command, [MODEL], client, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_cpp_example(sim_mesh: Mesh, client: Any, tmp_path: Path) -> None:
    missing = [t for t in ("make", "c++", "protoc", "grpc_cpp_plugin") if shutil.which(t) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    built = subprocess.run(
        ["make", "-s", f"OUT={tmp_path}"],
        cwd=EXAMPLES / "cpp", capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    check_example([str(tmp_path / "generate"), sim_mesh.grpc], [MODEL], client)


def test_buf_curl_reads_a_batch_and_its_errors(sim_mesh: Mesh) -> None:
    buf = str(Path(sys.executable).parent / "buf")
    url = f"http://{sim_mesh.grpc}/headrace.v1.InferenceService/GenerateBatch"
    requests = [{"model": MODEL, "prompt": PROMPT, "sampling": {"maxTokens": 3}}, {"model": MODEL}]
    curl = [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    done = run_example([*curl, "-d", json.dumps({"requests": requests}), url])
    assert done.returncode == 0, done.stderr
    assert '"field":"requests[1].prompt"' in done.stdout.replace(" ", "").replace("\n", "")
    refused = run_example([*curl, "-d", json.dumps({"requests": []}), url])
    assert refused.returncode != 0
    assert "google.rpc.BadRequest" in refused.stderr
