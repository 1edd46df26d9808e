"""Our llama against `transformers` on SmolLM2's real weights, in float32.

Reference: LlamaForCausalLM with the GGUF's tensors as `transformers` itself reads
them (conftest). Tolerance: the largest difference of logits at any position is at
most 1e-4 of the largest logit; both round sums of up to 1,536 products at 1e-7,
over 30 layers. However a prompt is cut, shared and batched, it must hold.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch

from headrace.blocks import namespace_key, unpack_tokens
from headrace.params import SamplingParams
from services.tokenizer.backends import Backend, load_backend, read_spec
from services.worker.engine import EngineConfig, SequenceRequest
from services.worker.engines.torch.attention import ATTENTION
from services.worker.engines.torch.engine import TorchEngine
from tests.torch_subject import Subject, error, run

if TYPE_CHECKING:
    from headrace.models.files import ModelFiles

TOLERANCE = 1e-4
NUM_TOKENS = 150
#: Blocks in no order, as after long use.
SCATTERED = random.Random(0).sample(range(10, 64), 10)
CONSECUTIVE = list(range(10))
QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def subject(smollm2: ModelFiles) -> Subject:
    return Subject(smollm2)


@pytest.fixture(scope="module")
def tokenizer(smollm2: ModelFiles) -> Backend:
    return load_backend(read_spec(smollm2))


@pytest.fixture(scope="module")
def tokens(tokenizer: Backend) -> list[int]:
    text = "The headrace is the channel that feeds a mill wheel. " * 20
    return unpack_tokens(tokenizer.encode(QUESTION + text))[:NUM_TOKENS]


@pytest.fixture(scope="module")
def expected(reference: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("table", [CONSECUTIVE, SCATTERED], ids=["consecutive", "scattered"])
def test_a_prompt_at_once(
    subject: Subject, tokens: list[int], expected: torch.Tensor, table: list[int]
) -> None:
    found = subject.logits(subject.runner(), run(tokens, 0, NUM_TOKENS, table))
    assert error(found, expected) < TOLERANCE


@pytest.mark.parametrize("cuts", [[16, 32, 100], [1, 2, 50], [131, 149]], ids=str)
def test_a_prompt_in_chunks(
    subject: Subject, tokens: list[int], expected: torch.Tensor, cuts: list[int]
) -> None:
    runner = subject.runner()
    bounds = [0, *cuts, NUM_TOKENS]
    for start, end in pairwise(bounds):
        found = subject.logits(runner, run(tokens, start, end, SCATTERED))
        assert error(found, expected[start:end]) < TOLERANCE


def test_a_prefix_that_another_sequence_computed(
    subject: Subject, tokens: list[int], expected: torch.Tensor
) -> None:
    runner = subject.runner()
    other = tokens[:64] + [5] * 30
    subject.logits(runner, run(other, 0, len(other), CONSECUTIVE))
    shared = CONSECUTIVE[:4] + SCATTERED[4:]
    found = subject.logits(runner, run(tokens, 64, NUM_TOKENS, shared))
    assert error(found, expected[64:]) < TOLERANCE


@pytest.mark.parametrize("attention", [name for name in ATTENTION if name != "plain"])
def test_batched_with_others(
    subject: Subject, tokens: list[int], expected: torch.Tensor, attention: str
) -> None:
    """Two decode and two prefill in one step; each finds what it would alone."""
    runner = subject.runner(attention)
    for layer in runner._cache.layers:
        layer.zero_()
    near, far = [10, 11], CONSECUTIVE
    subject.logits(runner, run(tokens, 0, 20, near))
    subject.logits(runner, run(tokens, 0, 148, far))
    items = [
        run(tokens, 20, 21, near),
        run(tokens, 148, 149, far),
        run(tokens, 0, 40, [20, 22, 21]),
        run(tokens, 0, 7, [30]),
    ]
    found = subject.logits(runner, *items)
    at = 0
    for item in items:
        rows = found[at : at + len(item.token_ids)]
        assert error(rows, expected[item.start : item.end]) < TOLERANCE
        at += len(item.token_ids)


def test_decoding(subject: Subject, tokens: list[int], expected: torch.Tensor) -> None:
    runner = subject.runner()
    subject.logits(runner, run(tokens, 0, 100, SCATTERED))
    for position in range(100, 140):
        found = subject.logits(runner, run(tokens, position, position + 1, SCATTERED))
        assert error(found, expected[position : position + 1]) < TOLERANCE


def test_bfloat16_weights_stay_near(
    smollm2: ModelFiles, tokens: list[int], expected: torch.Tensor
) -> None:
    """What "auto" serves: bfloat16 keeps 8 bits, and logits stay within 4 % of the largest."""
    subject = Subject(smollm2, "auto")
    runner = subject.runner()
    found = subject.logits(runner, run(tokens, 0, NUM_TOKENS - 1, SCATTERED))
    assert error(found, expected[:-1]) < 0.04
    last = subject.logits(runner, run(tokens, NUM_TOKENS - 1, NUM_TOKENS, SCATTERED))
    assert error(last, expected[-1:]) < 0.04


def _engine(smollm2: ModelFiles, dtype: str) -> TorchEngine:
    config = EngineConfig(
        str(smollm2.path), smollm2.name, dtype=dtype, num_threads=2, kv_cache_mib=64
    )
    return TorchEngine(config, lambda *_: None)


def _greedy(engine: TorchEngine, prompts: list[list[int]], count: int) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=count, ignore_eos=True)
    key = namespace_key(engine.info.model_revision)
    engine.submit([SequenceRequest(i, ids, [], params, key) for i, ids in enumerate(prompts)])
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        output = engine.step()
        for sequence_id, token in zip(output.sequence_ids, output.token_ids, strict=True):
            answers[sequence_id].append(token)
    return answers


def test_greedy_text_is_the_references(
    smollm2: ModelFiles, tokenizer: Backend, reference: Any, tokens: list[int]
) -> None:
    question = unpack_tokens(tokenizer.encode(QUESTION))
    count = 48
    wanted = []
    for prompt in (question, tokens):
        ids = torch.tensor([prompt])
        result = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
            min_new_tokens=count, do_sample=False, pad_token_id=2,
            eos_token_id=None,
        )  # fmt: skip
        wanted.append(result[0, len(prompt) :].tolist())

    found = _greedy(_engine(smollm2, "float32"), [question, tokens], count)

    assert found == wanted


def test_greedy_text_is_english(smollm2: ModelFiles, tokenizer: Backend) -> None:
    question = unpack_tokens(tokenizer.encode(QUESTION))
    (answer,) = _greedy(_engine(smollm2, "auto"), [question], 8)
    text = tokenizer.texts.decode(answer, skip_special=True)
    assert text.startswith("The capital of France is Paris")
