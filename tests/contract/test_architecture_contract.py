"""What every architecture of the torch engine must compute: `transformers`' logits.

Tiny random models, as that library makes and saves them, in float32. Tolerance: at
any position the largest difference is at most 1e-4 of the largest logit. However a
prompt is cut, shared and batched, it must hold. An entry of MODELS needs an entry
of CASES, and then all tests here run on it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch

from headrace.models.files import from_path
from headrace.params import SamplingParams
from services.worker.engines.torch.attention import ATTENTION, KVCache, kv_groups
from services.worker.engines.torch.device import Placement
from services.worker.engines.torch.models import MODELS
from services.worker.engines.torch.runner import DecodeSteps, TorchRunner
from services.worker.model_config import ARCHITECTURES
from services.worker.plan import BlockTable, ScheduledSequence, StepPlan
from tests.torch_subject import BLOCK_SIZE, NUM_BLOCKS, Subject, error, run

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-4
NUM_TOKENS = 120
#: Blocks in no order, as after long use.
SCATTERED = random.Random(0).sample(range(10, 64), 8)
CONSECUTIVE = list(range(8))
BASE = {
    "vocab_size": 200, "max_position_embeddings": 128, "num_hidden_layers": 3,
    "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN3_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
GEMMA3 = {"head_dim": 16, "sliding_window": 11, "num_hidden_layers": 4,
          "sliding_window_pattern": 2, "query_pre_attn_scalar": 24}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.5, 6.0]}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model by transformers' class, with changes to BASE."""

    architecture: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    shards: str = "5GB"
    #: The longest sequence served, where it is not the model's.
    context_len: int | None = None


CASES = {
    "llama": Case("llama", "Llama"),
    "llama, tied": Case("llama", "Llama", {"tie_word_embeddings": True}),
    "llama, one kv head": Case("llama", "Llama", {"num_key_value_heads": 1}),
    "llama, a kv head each": Case("llama", "Llama", {"num_key_value_heads": 6}),
    "llama, head_dim apart": Case("llama", "Llama", {"head_dim": 16}),
    "llama, shards": Case("llama", "Llama", shards="20KB"),
    "llama, linear rope": Case("llama", "Llama", {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
    "llama, llama3 rope": Case("llama", "Llama", {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 64}}),
    "llama, dynamic rope": Case("llama", "Llama", {
        "max_position_embeddings": 40,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
        context_len=NUM_TOKENS),
    "llama, dynamic rope not needed": Case("llama", "Llama", {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
        context_len=NUM_TOKENS),
    "mistral": Case("mistral", "Mistral", {"sliding_window": 10}),
    "mistral, no window": Case("mistral", "Mistral", {"sliding_window": None}),
    "qwen2": Case("qwen2", "Qwen2"),
    "qwen2, window": Case("qwen2", "Qwen2", WINDOW),
    "qwen2, yarn": Case("qwen2", "Qwen2", {"rope_parameters": YARN}),
    "qwen3": Case("qwen3", "Qwen3", {"head_dim": 16}),
    "qwen3, window": Case("qwen3", "Qwen3", {"head_dim": 8, **WINDOW}),
    "gemma3": Case("gemma3", "Gemma3", GEMMA3),
    "gemma3, scaled rope": Case("gemma3", "Gemma3", {**GEMMA3, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "gemma3, soft caps": Case("gemma3", "Gemma3", {
        **GEMMA3, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 2.0}),
    "phi3": Case("phi3", "Phi3"),
    "phi3, part of a head, window": Case("phi3", "Phi3", {
        "sliding_window": 13,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                            "partial_rotary_factor": 0.75}}),
    "phi3, longrope, short": Case("phi3", "Phi3", {
        "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75},
        "original_max_position_embeddings": 128}),
    "phi3, longrope, long": Case("phi3", "Phi3", {
        "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75},
        "original_max_position_embeddings": 32}),
    "mixtral": Case("mixtral", "Mixtral", MOE),
    "mixtral, one expert each, window": Case("mixtral", "Mixtral", {
        **MOE, "num_experts_per_tok": 1, "sliding_window": 10}),
    "qwen3_moe": Case("qwen3_moe", "Qwen3Moe", {
        **QWEN3_MOE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe, dense layers": Case("qwen3_moe", "Qwen3Moe", {
        **QWEN3_MOE, "head_dim": 8, "decoder_sparse_step": 2, "mlp_only_layers": [1],
        "num_hidden_layers": 4}),
}  # fmt: skip


def make(transformers: Any, case: Case, **changes: Any) -> Any:
    """A model with random weights, none of them where training begins."""
    torch.manual_seed(0)
    kind = f"{case.name}TextConfig" if case.name == "Gemma3" else f"{case.name}Config"
    config = getattr(transformers, kind)(**(BASE | case.config | changes))
    if config.to_dict().get("attn_logit_softcapping"):
        cap_scores(transformers, config.attn_logit_softcapping)
        config._attn_implementation = "capped"
    model = getattr(transformers, f"{case.name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                # Norms begin as ones or zeros and biases as zeros.
                weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def cap_scores(transformers: Any, soft_cap: float) -> None:
    """Gemma 3 has the key in its config, and its attention the code, but no call joins them."""
    from transformers.masking_utils import eager_mask
    from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

    transformers.AttentionInterface.register(
        "capped", partial(eager_attention_forward, softcap=soft_cap)
    )
    transformers.AttentionMaskInterface.register("capped", eager_mask)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing by threads, and lose where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Loaded:
    path: Path
    subject: Subject
    tokens: list[int]
    expected: torch.Tensor
    #: What `transformers` makes of it in bfloat16.
    rough: torch.Tensor


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def loaded(
    request: pytest.FixtureRequest, transformers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Loaded:
    case: Case = request.param
    path: Path = tmp_path_factory.mktemp("model")
    model = make(transformers, case)
    model.save_pretrained(path, max_shard_size=case.shards)
    assert (len(list(path.glob("*.safetensors"))) > 1) == (case.shards == "20KB")
    tokens = torch.randint(0, BASE["vocab_size"], (NUM_TOKENS,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
        rough = model.bfloat16()(torch.tensor([tokens])).logits[0]
    subject = Subject(from_path(path, "tiny"), context_len=case.context_len)
    assert subject.args.architecture == case.architecture
    return Loaded(path, subject, tokens, expected, rough)


def test_every_architecture_has_a_case() -> None:
    assert set(MODELS) == set(ARCHITECTURES) == {case.architecture for case in CASES.values()}


@pytest.mark.parametrize("table", [CONSECUTIVE, SCATTERED], ids=["consecutive", "scattered"])
def test_a_prompt_at_once(loaded: Loaded, table: list[int]) -> None:
    subject = loaded.subject
    found = subject.logits(subject.runner(), run(loaded.tokens, 0, NUM_TOKENS, table))
    assert error(found, loaded.expected) < TOLERANCE


@pytest.mark.parametrize("cuts", [[16, 32, 100], [1, 2, 50], [101, 119]], ids=str)
def test_a_prompt_in_chunks(loaded: Loaded, cuts: list[int]) -> None:
    runner = loaded.subject.runner()
    for start, end in pairwise([0, *cuts, NUM_TOKENS]):
        found = loaded.subject.logits(runner, run(loaded.tokens, start, end, SCATTERED))
        assert error(found, loaded.expected[start:end]) < TOLERANCE


def test_a_prefix_that_another_sequence_computed(loaded: Loaded) -> None:
    runner = loaded.subject.runner()
    other = loaded.tokens[:64] + [5] * 30
    loaded.subject.logits(runner, run(other, 0, len(other), CONSECUTIVE))
    shared = CONSECUTIVE[:4] + SCATTERED[4:]
    found = loaded.subject.logits(runner, run(loaded.tokens, 64, NUM_TOKENS, shared))
    assert error(found, loaded.expected[64:]) < TOLERANCE


@pytest.mark.parametrize("attention", ATTENTION)
def test_batched_with_others(loaded: Loaded, attention: str) -> None:
    """Two decode and two prefill in one step; each finds what it would alone."""
    runner = loaded.subject.runner(attention)
    for layer in runner._cache.layers:
        layer.zero_()
    near, far = [10, 11], CONSECUTIVE
    loaded.subject.logits(runner, run(loaded.tokens, 0, 20, near))
    loaded.subject.logits(runner, run(loaded.tokens, 0, 118, far))
    items = [
        run(loaded.tokens, 20, 21, near),
        run(loaded.tokens, 118, 119, far),
        run(loaded.tokens, 0, 40, [20, 22, 21]),
        run(loaded.tokens, 0, 7, [30]),
    ]
    found = loaded.subject.logits(runner, *items)
    at = 0
    for item in items:
        rows = found[at : at + len(item.token_ids)]
        assert error(rows, loaded.expected[item.start : item.end]) < TOLERANCE
        at += len(item.token_ids)


def test_decoding(loaded: Loaded) -> None:
    runner = loaded.subject.runner()
    loaded.subject.logits(runner, run(loaded.tokens, 0, 90, SCATTERED))
    for position in range(90, NUM_TOKENS):
        item = run(loaded.tokens, position, position + 1, SCATTERED)
        found = loaded.subject.logits(runner, item)
        assert error(found, loaded.expected[position : position + 1]) < TOLERANCE


def test_decoding_in_fixed_buffers(loaded: Loaded) -> None:
    """As CUDA graphs do: rows that fill up, a table for each KV group, blocks given up."""
    subject = loaded.subject
    groups = kv_groups(subject.args)
    cache = KVCache(subject.args, NUM_BLOCKS, BLOCK_SIZE, subject.placement, groups)
    for layer in cache.layers:
        layer.zero_()
    blocks = iter(random.Random(1).sample(range(NUM_BLOCKS), NUM_BLOCKS))
    lengths = [4, 60, 116, 30]
    tables = [[[next(blocks) for _ in range(n // BLOCK_SIZE + 1)] for _ in groups] for n in lengths]

    def item(number: int, start: int, end: int) -> ScheduledSequence:
        found = []
        for group, table in zip(groups, tables[number], strict=True):
            gone = 0 if group.window is None else max(0, start - group.window + 1) // BLOCK_SIZE
            found.append(BlockTable(gone, table[gone:]))
        return ScheduledSequence(
            number, loaded.tokens[start:end], start, found[0].blocks, True, SamplingParams(),
            found[0].first, tuple(found[1:]),
        )  # fmt: skip

    plain = TorchRunner(subject.model, cache)
    steps = DecodeSteps(subject.model, cache, 4, capture=False)
    plain.logits(StepPlan([item(number, 0, length) for number, length in enumerate(lengths)]))
    for offset, numbers in enumerate([(0, 1, 2, 3), (3, 1, 2), (2, 1)]):
        places = [lengths[number] + offset for number in numbers]
        plan = StepPlan([item(n, at, at + 1) for n, at in zip(numbers, places, strict=True)])
        with torch.inference_mode():
            found = steps.logits(plan)
        assert found is not None
        assert error(found, plain.logits(plan)) < 1e-5
        assert error(found, loaded.expected[places]) < TOLERANCE


def test_bfloat16_throughout(loaded: Loaded) -> None:
    """As on a GPU, activations and KV too: as near to float32 as transformers is in bfloat16.

    The median row: a router's near tie may fall to another expert.
    """
    bfloat16 = Placement(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    context_len = loaded.subject.args.context_len
    subject = Subject(from_path(loaded.path, "tiny"), bfloat16, context_len)
    runner = subject.runner()
    found = torch.cat([
        subject.logits(runner, run(loaded.tokens, start, end, SCATTERED))
        for start, end in ((0, 50), (50, 51), (51, NUM_TOKENS))
    ])  # fmt: skip
    assert found.dtype == torch.bfloat16
    ours, theirs = [
        (logits.float() - loaded.expected).abs().amax(-1).median()
        for logits in (found, loaded.rough)
    ]
    print(f"ours {ours:.3f}, transformers {theirs:.3f}")
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("used", [1, 2, 5])
@pytest.mark.parametrize(
    ("dense", "sparse"),
    [
        (Case("mistral", "Mistral", {"sliding_window": 10}),
         Case("mixtral", "Mixtral", {
             **MOE, "sliding_window": 10,
             "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})),
        (Case("qwen3", "Qwen3", {"head_dim": 16}),
         Case("qwen3_moe", "Qwen3Moe", {
             **QWEN3_MOE, "moe_intermediate_size": 96, "head_dim": 16, "norm_topk_prob": True})),
    ],
    ids=["mixtral", "qwen3_moe"],
)  # fmt: skip
def test_copied_experts_are_the_dense_model(
    transformers: Any, tmp_path: Path, dense: Case, sparse: Case, used: int
) -> None:
    """Whichever of N equal experts a token is sent to, it finds the dense feed-forward."""
    original = make(transformers, dense)
    original.save_pretrained(tmp_path / "dense")
    copied = make(transformers, sparse, num_experts_per_tok=used)
    with torch.no_grad():
        copied.load_state_dict(original.state_dict(), strict=False)
        for there, here in zip(copied.model.layers, original.model.layers, strict=True):
            gate_up = torch.cat((here.mlp.gate_proj.weight, here.mlp.up_proj.weight))
            there.mlp.experts.gate_up_proj.copy_(gate_up.expand(5, -1, -1))
            there.mlp.experts.down_proj.copy_(here.mlp.down_proj.weight.expand(5, -1, -1))
    copied.save_pretrained(tmp_path / "sparse")

    tokens = torch.randint(0, BASE["vocab_size"], (40,)).tolist()
    logits = []
    for folder in ("dense", "sparse"):
        subject = Subject(from_path(tmp_path / folder, "tiny"))
        logits.append(subject.logits(subject.runner(), run(tokens, 0, 40, SCATTERED)))
    assert error(logits[1], logits[0]) < 1e-5


def test_gemma_with_images_is_its_text_model(transformers: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = transformers.Gemma3TextConfig(**(BASE | GEMMA3))
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=199
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 190, (60,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]

    subject = Subject(from_path(tmp_path, "tiny"))

    found = subject.logits(subject.runner(), run(tokens, 0, 60, SCATTERED))
    assert error(found, expected) < TOLERANCE
