"""The engine's process behind its client: start, order of answers, load, death, close."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from headrace import status
from headrace.blocks import pack_tokens
from headrace.errors import StartupError, Unavailable
from headrace.params import SamplingParams
from services.worker.engine import EngineConfig, StepOutput
from services.worker.engine_client import EngineClient
from services.worker.engine_wire import Splitter, Stepped, Submit, decode_reply, encode
from tests.integration.worker_parts import alive, expected, until, write_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROMPT = list(range(3, 40))


class Started:
    """A client and the steps that it heard."""

    def __init__(self, config: EngineConfig) -> None:
        self.client = EngineClient("sim", config)
        self.client.on_step = self._hear
        self.steps: list[StepOutput] = []
        self.elapsed_ms: list[int] = []

    def _hear(self, output: StepOutput) -> None:
        self.steps.append(output)
        self.elapsed_ms.append(self.client.step_elapsed_ms())

    def submit(self, number: int, max_tokens: int) -> None:
        self.client.submit(
            Submit(
                sequence_id=number,
                prompt_ids=pack_tokens(PROMPT),
                generated_ids=b"",
                sampling=SamplingParams(temperature=0, seed=0, max_tokens=max_tokens),
                namespace_key=bytes(16),
                priority=0,
                tenant="",
            )
        )

    def ended(self) -> bool:
        return any(step.ends for step in self.steps)


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(
        model_path=str(write_model(tmp_path / "tiny")),
        model_name="tiny",
        num_blocks=128,
        sim_step_ms=1,
        sim_prefill_ms_per_token=0,
    )


@pytest.fixture
async def engine(config: EngineConfig, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Started]:
    started = Started(config)
    info = await started.client.start()
    assert info.engine == "sim"
    yield started
    await started.client.close()
    assert not alive(started.client.pid)
    assert "does not end" not in caplog.text


async def test_tokens_come_step_by_step(engine: Started) -> None:
    engine.submit(1, 30)
    assert engine.client.stats().queued_sequences == 1
    assert engine.client.stats().queued_prefill_tokens == len(PROMPT)
    await until(engine.ended)
    tokens = [token for step in engine.steps for token in step.token_ids]
    assert tokens == expected(PROMPT, 30)
    assert [step.step for step in engine.steps] == list(range(1, len(engine.steps) + 1))
    assert engine.client.stats().queued_sequences == 0
    assert engine.client.step_elapsed_ms() == 0


async def test_a_step_is_timed_from_the_one_before(engine: Started) -> None:
    engine.submit(1, 300)
    assert engine.client.step_elapsed_ms() >= 0
    await until(engine.ended)
    # 300 steps of 1 ms each; when a step is heard, the next has only begun.
    assert max(engine.elapsed_ms) < 100


async def test_blocks_are_those_of_the_steps_heard(engine: Started) -> None:
    engine.submit(1, 200)
    for _ in range(5):
        answers: list[tuple[list[int], set[int]]] = []

        def read(owned: list[int], answers: list[tuple[list[int], set[int]]] = answers) -> None:
            heard: set[int] = set()
            for step in engine.steps:
                heard = heard - set(step.removed) | set(step.stored)
            answers.append((owned, heard))

        await engine.client.read_blocks(read)
        owned, heard = answers[0]
        assert sorted(owned) == sorted(heard)


async def test_its_death_is_told(engine: Started) -> None:
    engine.submit(1, 100_000)
    os.kill(engine.client.pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        await engine.client.read_blocks(lambda owned: None)
    assert "SIGKILL" in await engine.client.died


async def test_it_says_why_it_cannot_start(tmp_path: Path) -> None:
    client = EngineClient("sim", EngineConfig(str(tmp_path / "nowhere"), "nowhere"))
    with pytest.raises(StartupError, match="nowhere"):
        await client.start()
    await client.close()
    assert not client.died.done()


async def test_progress_is_passed_on(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status"
    monkeypatch.setenv(status.VARIABLE, str(path))
    client = EngineClient("sim", config)
    await client.start()
    await client.close()
    progress = status.read(path)
    assert progress is not None
    assert "config" in progress.phase


async def test_a_start_can_be_given_up(config: EngineConfig) -> None:
    client = EngineClient("sim", config)
    starting = asyncio.ensure_future(client.start())
    await until(lambda: client.pid)
    starting.cancel()
    await client.close()
    assert not alive(client.pid)


def test_messages_may_be_cut_anywhere() -> None:
    sent = [Stepped(StepOutput(number, [1, 2], [3, 4]), number) for number in range(1, 4)]
    stream = b"".join(encode(message) for message in sent)
    for size in (1, 2, 3, 7, len(stream)):
        splitter = Splitter()
        got = [
            decode_reply(data)
            for start in range(0, len(stream), size)
            for data in splitter.feed(stream[start : start + size])
        ]
        assert got == sent
