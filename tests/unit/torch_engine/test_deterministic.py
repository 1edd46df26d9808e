"""Deterministic mode: the same logits, to the bit, however they came about."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from headrace.blocks import namespace_key
from headrace.errors import StartupError
from headrace.models.files import from_path
from headrace.params import SamplingParams
from services.worker import model_config
from services.worker.engine import EngineConfig, SequenceRequest
from services.worker.engines.torch.attention import KVCache
from services.worker.engines.torch.device import place
from services.worker.engines.torch.engine import TorchEngine
from services.worker.engines.torch.kernels import compiler, kernels
from services.worker.engines.torch.runner import TorchRunner
from services.worker.plan import ScheduledSequence, StepPlan

if TYPE_CHECKING:
    from pathlib import Path

    from services.worker.plan import StepResult

pytestmark = pytest.mark.skipif(kernels() is None, reason="needs a C compiler")
KEY = namespace_key("deterministic")
NUM_OUT = 24
SIZES = {
    "vocab_size": 203, "max_position_embeddings": 256, "num_hidden_layers": 3,
    "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3, head norms": ("Qwen3", {}),
    "qwen2, biases, windows": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1,
        "hidden_size": 96}),
    "gemma3, windows, GELU": ("Gemma3", {
        "sliding_window": 11, "num_hidden_layers": 4, "sliding_window_pattern": 2}),
    "mixtral, experts": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
}  # fmt: skip


class Recording:
    """A runner that notes the logits of every token that it chooses, and how it got there."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        #: (sequence id, position that is sampled) -> logits.
        self.logits: dict[tuple[int, int], torch.Tensor] = {}
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        asked = [item for item in plan.scheduled if item.sample]
        if asked:
            for item, row in zip(asked, self.inner.logits(plan), strict=True):
                self.logits[item.sequence_id, item.end] = row
        return self.inner.execute(plan)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, transformers: Any, tmp_path: Path) -> Path:
    """A tiny random model on disk."""
    torch.manual_seed(0)
    name, changes = MODELS[request.param]
    kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**(SIZES | changes))
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path)
    return tmp_path


def start(path: Path, **options: Any) -> tuple[TorchEngine, Recording]:
    settings = {"dtype": "bfloat16", "num_threads": 2, "block_size": 4, "num_blocks": 400,
                "max_step_tokens": 200, "max_sequences": 8, "deterministic": True}  # fmt: skip
    engine = TorchEngine(EngineConfig(str(path), "tiny", **(settings | options)), lambda *_: None)
    runner = Recording(engine._runner)
    engine._runner = runner
    return engine, runner


def run(engine: TorchEngine, prompts: dict[int, list[int]], generated: int = 0,
        tokens: dict[int, list[int]] | None = None) -> dict[int, Any]:  # fmt: skip
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=NUM_OUT, ignore_eos=True)
    engine.submit(
        [SequenceRequest(i, prompt, (tokens or {}).get(i, [])[:generated], params, KEY)
         for i, prompt in prompts.items()]
    )  # fmt: skip
    ends = {}
    while engine.has_work():
        ends |= {end.sequence_id: end for end in engine.step().ends}
    assert all(end.reason == "length" for end in ends.values())
    return ends


def prompts_of(seed: int, count: int = 7) -> dict[int, list[int]]:
    numbers = random.Random(seed)
    return {
        i: [numbers.randrange(3, 203) for _ in range(numbers.randrange(3, 30))]
        for i in range(count)
    }


def test_logits_are_the_same_alone_batched_chunked_preempted_and_cached(model: Path) -> None:
    prompts = prompts_of(1)
    alone: dict[tuple[int, int], torch.Tensor] = {}
    for i, prompt in prompts.items():
        engine, runner = start(model)
        run(engine, {i: prompt})
        alone |= runner.logits
    tokens = {i: [int(alone[i, len(p) + n].argmax()) for n in range(NUM_OUT)]
              for i, p in prompts.items()}  # fmt: skip

    # Chunks of all sizes, and too few blocks for all sequences at once.
    num_blocks = 36 + 8 * len(runner.inner._cache.groups)
    engine, runner = start(model, max_step_tokens=11, num_blocks=num_blocks)
    run(engine, prompts)
    assert max(len(plan.scheduled) for plan in runner.plans) > 2
    assert was_preempted(runner)
    assert_same(runner, alone)

    engine, runner = start(model, max_step_tokens=29)
    run(engine, prompts)
    cached = run(engine, prompts)
    assert sum(end.cached_tokens > 0 for end in cached.values()) > 3
    assert_same(runner, alone)

    # Resumed: what was decoded is now prefilled.
    engine, runner = start(model, num_threads=1)
    run(engine, prompts, generated=5, tokens=tokens)
    assert all(end > len(prompts[i]) + 4 for i, end in runner.logits)
    assert_same(runner, alone)


def test_tables_of_kv_groups_change_nothing(model: Path) -> None:
    """Layers that free what their window has left give what layers that keep all give."""
    prompt = prompts_of(3)[1] + prompts_of(3)[2]
    engine, runner = start(model, max_step_tokens=13)
    run(engine, {1: prompt})
    files = from_path(model, "tiny")
    args = replace(model_config.read(files), context_len=engine.info.context_len)
    placement = place("cpu", "bfloat16", deterministic=True)
    whole = TorchRunner(runner.inner._model, KVCache(args, 64, 4, placement))
    tokens = list(prompt)
    for _ in range(NUM_OUT):
        blocks = list(range(64))
        plan = StepPlan([ScheduledSequence(1, tokens, 0, blocks, True, SamplingParams())])
        (row,) = whole.logits(plan)
        assert torch.equal(row, runner.logits[1, len(tokens)])
        tokens.append(int(row.argmax()))


def was_preempted(runner: Recording) -> bool:
    """Whether some sequence's prefill began again."""
    reached: dict[int, int] = {}
    again = False
    for plan in runner.plans:
        for item in plan.scheduled:
            again |= item.start < reached.get(item.sequence_id, 0)
            reached[item.sequence_id] = item.end
    return again


def assert_same(runner: Recording, alone: dict[tuple[int, int], torch.Tensor]) -> None:
    for key, row in runner.logits.items():
        assert torch.equal(row, alone[key]), key


def test_says_that_resume_is_exact(transformers: Any, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert start(tmp_path)[0].info.resume == "exact"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 36}, "hidden_size is 36, not a multiple of 8"),
        ({"head_dim": 8}, "half the rotary_dim is 4"),
        ({"head_dim": 12}, "does not take heads of 12"),
    ],
)
def test_refuses_shapes_that_the_kernels_do_not_take(
    transformers: Any, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    config = transformers.LlamaConfig(**(SIZES | changes))
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(StartupError, match=f"deterministic: .*{message}"):
        start(tmp_path)
    engine, _ = start(tmp_path, deterministic=False)
    assert engine.info.resume == "semantic"


def test_refuses_where_nothing_compiles(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    kernels.cache_clear()
    try:
        assert compiler.library() is None
        with pytest.raises(StartupError, match="is there a C compiler"):
            start(tiny)
        engine, _ = start(tiny, deterministic=False)
        assert engine.info.resume == "semantic"
        run(engine, prompts_of(2, count=3))
    finally:
        kernels.cache_clear()
