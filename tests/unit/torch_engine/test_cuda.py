"""The engine on a GPU against the engine on the CPU. Needs torch, numpy and pytest alone:

    python -m pytest -c /dev/null --rootdir . --import-mode importlib \\
        tests/unit/torch_engine/test_cuda.py
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from headrace.blocks import namespace_key
from headrace.params import SamplingParams
from services.worker.engine import EngineInfo, SequenceRequest
from services.worker.engine_core import EngineCore
from services.worker.engines.torch.attention import (
    KVCache,
    attention_class,
    kv_groups,
    spans_of,
)
from services.worker.engines.torch.device import Placement
from services.worker.engines.torch.models import MODELS
from services.worker.engines.torch.runner import DecodeSteps, TorchRunner
from services.worker.engines.torch.sampling import Sampler
from services.worker.model_config import LayerAttention
from services.worker.plan import ScheduledSequence, StepPlan, StepResult
from tests.torch_tiny import CONFIGS, tiny_model

if TYPE_CHECKING:
    from services.worker.model_config import ModelConfig

HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="no GPU: torch.cuda.is_available() is false"),
    # Triton 3.9 tells of a default that will change.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
CPU = Placement(torch.device("cpu"), torch.float32, torch.float32)
GPU = torch.device("cuda" if HAS_GPU else "cpu")
BLOCK_SIZE, NUM_BLOCKS = 16, 64
GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=60, ignore_eos=True)
#: The largest difference of a logit, relative to the largest.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def on_gpu(dtype: torch.dtype) -> Placement:
    return Placement(GPU, dtype, dtype)


def runner_of(config: ModelConfig, placement: Placement, graph_rows: int = 0) -> TorchRunner:
    return TorchRunner(
        tiny_model(config, placement), zeroed(config, placement), graph_rows=graph_rows
    )


def zeroed(config: ModelConfig, placement: Placement) -> KVCache:
    cache = KVCache(config, NUM_BLOCKS, BLOCK_SIZE, placement)
    for layer in cache.layers:
        layer.zero_()
    return cache


def run(
    number: int, tokens: list[int], start: int, end: int, table: list[int]
) -> ScheduledSequence:
    return ScheduledSequence(number, tokens[start:end], start, table, True, GREEDY)


def steps(config: ModelConfig) -> list[StepPlan]:
    """Prefill in chunks, decodes alone, several, and beside a prefill."""
    rng = random.Random(0)
    tokens = [rng.randrange(config.vocab_size) for _ in range(200)]
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    a, b, c = free[:12], free[12:24], free[24:36]
    return [
        StepPlan([run(0, tokens, 0, 100, a)]),
        StepPlan([run(0, tokens, 100, 101, a), run(1, tokens, 0, 33, b)]),
        StepPlan([run(0, tokens, 101, 102, a)]),
        StepPlan([run(0, tokens, 102, 103, a), run(1, tokens, 33, 34, b)]),
        StepPlan([run(1, tokens, 34, 35, b), run(2, tokens, 0, 1, c), run(0, tokens, 103, 104, a)]),
        StepPlan([run(1, tokens, 35, 36, b)]),
        StepPlan([run(0, tokens, 104, 180, a)]),
    ]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found = found.cpu()
    assert found.isfinite().all()
    return float((found - expected).abs().max() / expected.abs().max())


def test_every_architecture_is_here() -> None:
    assert set(CONFIGS) == set(MODELS)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    """Where a router's near tie falls to another expert in bfloat16, a row may be far off."""
    config = CONFIGS[name]
    there = runner_of(config, on_gpu(dtype), graph_rows=4 if config.experts is None else 0)
    here = runner_of(config, CPU)
    errors = [error(there.logits(plan), here.logits(plan)) for plan in steps(config)]
    is_rough = config.experts is not None and dtype == torch.bfloat16
    found = min(errors) if is_rough else max(errors)
    assert found < TOLERANCES[dtype], errors


@pytest.mark.parametrize("name", [name for name, item in CONFIGS.items() if item.experts is None])
def test_graphs_change_nothing(name: str) -> None:
    config, placement = CONFIGS[name], on_gpu(torch.bfloat16)
    plain = runner_of(config, placement)
    cache = zeroed(config, placement)
    fixed = [DecodeSteps(plain._model, cache, 4, capture=flag and HAS_GPU) for flag in (0, 1)]
    prefills = TorchRunner(plain._model, cache)
    replayed = 0
    # Twice: once to capture, once with nothing but replays.
    for _ in range(2):
        for plan in steps(config):
            expected = plain.logits(plan)
            with torch.inference_mode():
                results = [decode.logits(plan) for decode in fixed]
            if results[0] is None or results[1] is None:
                prefills.logits(plan)
                continue
            replayed += 1
            assert torch.equal(results[0], results[1])
            assert error(results[1], expected.cpu()) < 0.05
    assert replayed == 8
    assert fixed[1].num_captured == (3 if HAS_GPU else 0)


@pytest.mark.parametrize(
    "options",
    [LayerAttention(), LayerAttention(window=700), LayerAttention(soft_cap=5.0)],
    ids=["plain", "window", "soft cap"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_prefill_keeps_no_scores(options: LayerAttention, dtype: torch.dtype) -> None:
    """8,192 queries, the last 2,048 of them compared. All scores of 32 heads: 4 to 8 GiB."""
    heads, kv_heads, dim, count = 32, 8, 64, 8192 if HAS_GPU else 256

    class Shape:
        num_layers, num_heads, num_kv_heads, head_dim = 1, heads, kv_heads, dim
        attention = (options,)

    blocks = random.Random(0).sample(range(600), count // BLOCK_SIZE)
    caches = [KVCache(Shape, 600, BLOCK_SIZE, on_gpu(t)) for t in (dtype, torch.float32)]  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, heads + 2 * kv_heads, dim, generator=generator).to(GPU, dtype)
    attend = attention_class("batched")(
        caches[0], spans_of(StepPlan([run(0, [0] * count, 0, count, blocks)]), BLOCK_SIZE)
    )
    before = 0
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found = attend(0, rows[:, :heads], rows[:, heads:])
    if HAS_GPU:
        assert torch.cuda.max_memory_allocated() - before < 1 << 30
    # The plain way, in float32, for the end alone: the other cache has the KV already.
    caches[1].layers[0].copy_(caches[0].layers[0])
    tail = count // 4
    plan = StepPlan([run(0, [0] * count, count - tail, count, blocks)])
    plain = attention_class("plain")(caches[1], spans_of(plan, BLOCK_SIZE))
    expected = plain(0, rows[-tail:, :heads].float(), rows[-tail:, heads:].float())
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    assert error(found[-tail:].float(), expected.cpu()) < tolerance


def test_sampling_is_that_of_the_cpu() -> None:
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=seed, repetition_penalty=r)
        for seed, (t, k, p, m, r) in enumerate([
            (0.0, 0, 1.0, 0.0, 1.0), (1.0, 0, 1.0, 0.0, 1.0), (0.7, 20, 1.0, 0.0, 1.0),
            (1.0, 0, 0.9, 0.0, 1.0), (1.3, 0, 1.0, 0.05, 1.0), (0.9, 50, 0.8, 0.02, 1.2),
        ] * 8)
    ]  # fmt: skip
    tokens = [5, 6, 7, 8]
    items = [
        ScheduledSequence(i, [8], 3, [0], True, item, tokens=tokens, num_prompt_tokens=2)
        for i, item in enumerate(params)
    ]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(items), 32_000, generator=generator) * 3
    here = Sampler().sample(logits.clone(), items)
    there = Sampler().sample(logits.to(GPU), items)
    assert there.token_ids == here.token_ids


class Watched:
    """A runner that counts how often a sequence had to begin anew."""

    def __init__(self, inner: TorchRunner) -> None:
        self.inner = inner
        self.num_preempted = 0
        self._reached: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for item in plan.scheduled:
            self.num_preempted += item.start < self._reached.get(item.sequence_id, 0)
            self._reached[item.sequence_id] = item.end
        return self.inner.execute(plan)


def generate(
    config: ModelConfig, placement: Placement, num_blocks: int
) -> tuple[dict[int, list[int]], int]:
    """What six sequences become in a cache with too little room for them."""
    most = 6
    cache = KVCache(config, num_blocks, BLOCK_SIZE, placement, kv_groups(config))
    is_static = config.experts is None
    runner = Watched(
        TorchRunner(tiny_model(config, placement), cache, graph_rows=most if is_static else 0)
    )
    info = EngineInfo(
        "torch", "tiny", "", config.vocab_size, 300, BLOCK_SIZE, num_blocks, most, (2,), "semantic"
    )
    core = EngineCore(
        info, runner, lambda: 0.0, max_step_tokens=64, max_sequences=most, kv_groups=cache.groups
    )
    rng = random.Random(3)
    prompts = [[rng.randrange(512) for _ in range(40 + 9 * i)] for i in range(most)]
    core.submit([
        SequenceRequest(i, prompt, [], GREEDY, namespace_key("tiny"))
        for i, prompt in enumerate(prompts)
    ])  # fmt: skip
    found: dict[int, list[int]] = {i: [] for i in range(most)}
    while core.has_work():
        output = core.step()
        core.check()
        for sequence_id, token in zip(output.sequence_ids, output.token_ids, strict=True):
            found[sequence_id].append(token)
    return found, runner.num_preempted


@pytest.mark.parametrize(("name", "num_blocks"), [("llama", 36), ("qwen2", 44), ("mixtral", 36)])
def test_an_engine_with_too_little_room(name: str, num_blocks: int) -> None:
    """Preempted (or, with windows, waiting) and resumed, in float32, to the CPU's tokens."""
    here, _ = generate(CONFIGS[name], CPU, num_blocks)
    there, num_preempted = generate(CONFIGS[name], on_gpu(torch.float32), num_blocks)
    assert num_preempted > 0 or name == "qwen2"
    assert all(len(tokens) == GREEDY.max_tokens for tokens in there.values())
    assert there == here
