"""The engine on a tiny random llama: loading, generating, and that batches change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from headrace.blocks import namespace_key
from headrace.errors import StartupError
from headrace.params import SamplingParams
from services.worker.engine import EngineConfig, SequenceRequest
from services.worker.engines import create
from services.worker.engines.torch.engine import TorchEngine
from services.worker.engines.torch.models import MODELS, model_class
from services.worker.engines.torch.runner import TorchRunner
from services.worker.engines.torch.sampling import Sampler
from services.worker.model_config import ARCHITECTURES
from services.worker.plan import ScheduledSequence, StepPlan

if TYPE_CHECKING:
    from pathlib import Path

KEY = namespace_key("tiny")


def start(path: Path, **options: Any) -> TorchEngine:
    config = EngineConfig(
        str(path), "tiny", dtype="float32", num_threads=2, block_size=4, num_blocks=64,
        max_step_tokens=24, max_sequences=8,
    )  # fmt: skip
    values = {name: getattr(config, name) for name in EngineConfig.__dataclass_fields__}
    return TorchEngine(EngineConfig(**(values | options)), lambda *_: None)


def request(
    number: int, prompt: list[int], generated: list[int] | None = None, **sampling: Any
) -> SequenceRequest:
    params = SamplingParams(**{"seed": number, "max_tokens": 12, "ignore_eos": True, **sampling})
    return SequenceRequest(number, prompt, generated or [], params, KEY)


def finish(engine: TorchEngine) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    while engine.has_work():
        output = engine.step()
        for sequence_id, token in zip(output.sequence_ids, output.token_ids, strict=True):
            tokens.setdefault(sequence_id, []).append(token)
        assert all(end.reason == "length" for end in output.ends)
    engine.check()
    return tokens


PROMPTS = [[(7 * i + 13 * j) % 320 for j in range(5 + 9 * i)] for i in range(6)]


def test_says_what_it_is(tiny: Path) -> None:
    info = start(tiny).info
    assert (info.engine, info.vocab_size, info.context_len) == ("torch", 320, 256)
    assert (info.block_size, info.total_blocks, info.eos_token_ids) == (4, 64, (2,))
    assert info.resume == "semantic"
    assert info.sampling <= set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_alone_together_and_resumed(tiny: Path, temperature: float) -> None:
    """Chunked prefill, preemption, prefix reuse and resuming leave the tokens as they are.

    In float32 roundings of 1e-6 meet no near tie among these few tokens.
    """
    alone = {}
    for i, prompt in enumerate(PROMPTS):
        engine = start(tiny)
        engine.submit([request(i, prompt, temperature=temperature)])
        alone |= finish(engine)
    # 24 blocks hold 96 tokens; all sequences need 237: they wait and are preempted.
    engine = start(tiny, num_blocks=24)
    engine.submit([request(i, p, temperature=temperature) for i, p in enumerate(PROMPTS)])
    assert finish(engine) == alone
    engine.submit(
        [request(i, p, alone[i][:5], temperature=temperature) for i, p in enumerate(PROMPTS)]
    )
    assert finish(engine) == {i: tokens[5:] for i, tokens in alone.items()}


def test_noise_is_that_of_the_sampled_position(tiny: Path) -> None:
    """A token is drawn for the position where it will stand, in every row that asks."""
    runner = start(tiny)._runner
    assert isinstance(runner, TorchRunner)
    params = [SamplingParams(seed=5, temperature=2.0), SamplingParams(temperature=0.0)]
    for length in range(1, 6):
        items = [
            ScheduledSequence(i, PROMPTS[i][:length], 0, [3 * i, 3 * i + 1], True, params[i])
            for i in range(2)
        ]
        skipped = ScheduledSequence(2, PROMPTS[2][:3], 0, [9], False, SamplingParams(seed=1))
        plan = StepPlan([items[0], skipped, items[1]])
        expected = Sampler().sample(runner.logits(plan), items).token_ids
        assert runner.execute(plan).token_ids == expected


def test_bfloat16_weights_generate(tiny: Path) -> None:
    engine = start(tiny, dtype="auto")
    engine.submit([request(0, PROMPTS[3]), request(1, PROMPTS[2])])
    tokens = finish(engine)
    assert [len(found) for found in tokens.values()] == [12, 12]


def test_kv_cache_size_gives_the_blocks(tiny: Path) -> None:
    # 2 layers, keys and values, 2 heads of 8: 64 numbers a token, 4 tokens a block.
    engine = start(tiny, num_blocks=0, kv_cache_mib=1)
    assert engine.info.total_blocks == (1 << 20) // (64 * 4 * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float3"}, "dtype"),
        ({"device": "cuda:77"}, "CUDA"),
        ({"num_threads": -1}, "num_threads"),
        ({"context_len": 1 << 20}, "context_len"),
        ({"block_size": 0}, "block_size"),
        ({"num_blocks": 1 << 40}, "no room for a KV cache"),
        ({"model_path": "/nowhere"}, "no model at /nowhere"),
    ],
)
def test_refuses_to_start(tiny: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        start(tiny, **options)


def test_the_table_of_engines_has_it(tiny: Path) -> None:
    engine = create("torch", EngineConfig(str(tiny), "tiny", num_blocks=4), lambda *_: None)
    assert isinstance(engine, TorchEngine)


def test_every_architecture_that_config_reads_is_here() -> None:
    assert set(ARCHITECTURES) == set(MODELS)
    assert all(model_class(name) for name in MODELS)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(StartupError, match="has no architecture 'mamba'"):
        model_class("mamba")
