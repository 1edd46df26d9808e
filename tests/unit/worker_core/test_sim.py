"""The sim engine: times, tokens, options, and what it reads of a model."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from headrace.errors import StartupError
from headrace.params import SamplingParams
from services.worker.engine import EngineConfig, SequenceRequest
from services.worker.engines.sim.clock import RealClock, VirtualClock
from services.worker.engines.sim.engine import SimEngine
from services.worker.engines.sim.runner import SimRunner, work_of
from services.worker.engines.sim.timing import StepWork, create
from services.worker.engines.sim.timing.linear import Linear
from services.worker.engines.sim.timing.roofline import GPUS, Roofline, Shape
from services.worker.engines.sim.tokens import fold, next_token
from services.worker.plan import ScheduledSequence, StepPlan

if TYPE_CHECKING:
    from pathlib import Path

    from headrace.models.files import ModelFiles

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "max_position_embeddings": 128,
    "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16,
    "num_attention_heads": 2, "eos_token_id": 3,
}  # fmt: skip


def silent(phase: str, fraction: float | None) -> None:
    """Nobody watches."""


def plan(*runs: tuple[int, int]) -> StepPlan:
    """Runs of (start, length), each in a block of its own."""
    items = [
        ScheduledSequence(number, [1] * length, start, [number], True, SamplingParams())
        for number, (start, length) in enumerate(runs)
    ]
    return StepPlan(items)


def test_a_plan_as_a_timing_models_work() -> None:
    work = work_of(plan((5, 1), (6, 1), (0, 8), (16, 4)), capacity_tokens=640)
    assert work == StepWork(2, 6 + 7, [(8, 0), (4, 16)], 640)
    assert work.prefill_tokens == 12


def test_virtual_time_advances_by_what_steps_take() -> None:
    clock = VirtualClock(100.0)
    times = Linear(step_ms=1000, step_ms_per_sequence=0, prefill_ms_per_token=0)
    runner = SimRunner(times, clock, [1, 2], num_blocks=4, block_size=16)
    runner.execute(plan((1, 1)))
    clock.wait_until(clock.now() + 0.0005)
    runner.execute(plan((2, 1)))
    clock.wait_until(50.0)
    assert clock.now() == pytest.approx(102.0005)


class SlackClock(VirtualClock):
    """Virtual time with real time's slack."""

    slack = RealClock.slack


def test_steps_keep_their_pace_whatever_happens_between_them() -> None:
    clock = SlackClock()
    times = Linear(step_ms=4, step_ms_per_sequence=0, prefill_ms_per_token=0)
    runner = SimRunner(times, clock, [1, 2], num_blocks=4, block_size=16)
    for position in range(1, 11):
        runner.execute(plan((position, 1)))
        assert clock.now() == pytest.approx(0.004 * position)
        clock.wait_until(clock.now() + 0.0015)
    # After idleness a step takes its full time.
    clock.wait_until(1.0)
    runner.execute(plan((12, 1)))
    assert clock.now() == pytest.approx(1.004)


def test_real_time_waits_at_least_as_long_as_asked() -> None:
    clock = RealClock()
    moment = clock.now() + 0.003
    clock.wait_until(moment)
    assert clock.now() >= moment
    clock.wait_until(moment - 1)


def test_a_token_depends_on_every_token_before_it() -> None:
    table = list(range(1000))
    tokens = [5, 6, 7, 8]
    assert next_token(tokens, table) == next_token(list(tokens), table)
    others = [[4, 6, 7, 8], [5, 6, 7, 9], [6, 5, 7, 8], [0, 5, 6, 7, 8], [5, 6, 7]]
    assert len({next_token(other, table) for other in [tokens, *others]}) == 6
    assert fold(fold(1, [5, 6])[-1], [7]) == fold(1, [5, 6, 7])[-1:]


def test_tokens_of_a_real_vocabulary_are_clean_words(smollm2: ModelFiles) -> None:
    config = EngineConfig(str(smollm2.path), smollm2.name, sim_step_ms=0, num_blocks=100)
    engine = SimEngine(config, silent, VirtualClock())
    assert len(engine.plain_tokens) > 10_000
    assert not set(engine.info.eos_token_ids) & set(engine.plain_tokens)
    prompt = list(range(100))
    engine.submit(
        [SequenceRequest(1, prompt, [], SamplingParams(seed=1, max_tokens=200), bytes(16))]
    )
    found: list[int] = []
    while engine.has_work():
        found += engine.step().token_ids
    assert len(set(found)) > 150
    for length in range(200):
        assert found[length] == next_token(prompt + found[:length], engine.plain_tokens)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["sim_step_ms", "sim_step_ms_per_sequence", "sim_prefill_ms_per_token"]
)
def test_bad_times_are_refused(name: str, value: float) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(StartupError, match=f"{name} must be 0 or more, not {value}"):
        SimEngine(EngineConfig("nowhere", "m", **options), silent)


def model_directory(path: Path, tokenizer: dict[str, Any] | None) -> Path:
    (path / "config.json").write_text(json.dumps(LLAMA))
    if tokenizer is not None:
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def test_a_directory_without_weights_or_tokenizer_is_enough(tmp_path: Path) -> None:
    path = model_directory(tmp_path, None)
    engine = SimEngine(EngineConfig(str(path), "m", num_blocks=4), silent)
    assert engine.plain_tokens == [token for token in range(64) if token != 3]
    assert engine.info.context_len == 64


@pytest.mark.parametrize("spec", ["polynomial", "roofline", "linear:prefill_ms_per_token=3"])
def test_an_engine_takes_the_time_of_the_model_that_its_flag_names(
    spec: str, tmp_path: Path
) -> None:
    clock = VirtualClock()
    path = model_directory(tmp_path, None)
    config = EngineConfig(str(path), "m", num_blocks=4, sim_timing=spec)
    engine = SimEngine(config, silent, clock)
    engine.submit([SequenceRequest(1, [1] * 20, [], SamplingParams(max_tokens=2), bytes(16))])
    engine.step()
    work = StepWork(0, 0, [(20, 0)], 64)
    if spec == "roofline":
        own = Shape(2, 8, 16, 2, 2, 4, 64)
        assert clock.now() == Roofline(GPUS["h100"], own).milliseconds(work) / 1000
    else:
        assert clock.now() == create(spec).milliseconds(work) / 1000


def test_an_unknown_timing_stops_the_engine(tmp_path: Path) -> None:
    config = EngineConfig(str(model_directory(tmp_path, None)), "m", sim_timing="sundial")
    with pytest.raises(StartupError, match="'sundial' is unknown"):
        SimEngine(config, silent)


def test_a_directorys_tokenizer_names_the_plain_tokens(tmp_path: Path) -> None:
    words = [f"Ġword{chr(97 + number)}" for number in range(20)]
    vocab = {text: number for number, text in enumerate(["<s>", "é", "12", "end", *words])}
    tokenizer = {"model": {"vocab": vocab}, "added_tokens": [{"id": 5, "content": words[1]}]}
    path = model_directory(tmp_path, tokenizer)
    engine = SimEngine(EngineConfig(str(path), "m"), silent)
    assert engine.plain_tokens == [4, *range(6, 24)]
