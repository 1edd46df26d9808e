"""What may enter the engine, and in which words the rest is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.blocks import pack_tokens
from headrace.errors import InvalidArgument, ResourceExhausted, Unavailable
from headrace.params import SamplingParams
from services.worker.admission import Submission, check, check_capacity
from services.worker.engine import EngineInfo

INFO = EngineInfo(
    engine="plain",
    model_revision="r",
    tokenizer_digest="t",
    vocab_size=100,
    context_len=32,
    block_size=16,
    total_blocks=8,
    max_sequences=2,
    eos_token_ids=(2,),
    resume="exact",
    sampling=frozenset({"temperature"}),
)
GOOD = Submission(
    slot=1,
    request_id="r",
    index=0,
    prompt_ids=pack_tokens([1, 2, 3]),
    generated_ids=b"",
    sampling=SamplingParams(temperature=0, seed=1, max_tokens=4),
    namespace_key=bytes(16),
)


def test_a_good_submission_passes_unchanged() -> None:
    assert check(GOOD, INFO) is GOOD


def test_max_tokens_is_cut_to_what_the_context_leaves() -> None:
    greedy = replace(GOOD, sampling=replace(GOOD.sampling, max_tokens=1000))
    assert check(greedy, INFO).sampling.max_tokens == 29


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"prompt_ids": b""}, "prompt", "at least one"),
        ({"prompt_ids": b"\1\0\0"}, "prompt_ids", "not 3"),
        ({"prompt_ids": pack_tokens([1, 100])}, "prompt_ids", "token id 100"),
        ({"generated_ids": pack_tokens([101])}, "generated_ids", "vocabulary of 100"),
        ({"prompt_ids": pack_tokens([1] * 32)}, "prompt", "32 tokens"),
        ({"namespace_key": b"x"}, "namespace_key", "16 bytes, not 1"),
    ],
)
def test_wrong_ids_are_refused(change: dict[str, bytes], field: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as caught:
        check(replace(GOOD, **change), INFO)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"seed": None}, "seed", "must be set"),
        ({"max_tokens": None}, "max_tokens", "must be set"),
        ({"max_tokens": 0}, "max_tokens", "not 0"),
        ({"temperature": 2.5}, "temperature", "not 2.5"),
        ({"top_p": 0.5}, "top_p", "not supported by the engine plain"),
        ({"stop_token_ids": (7,)}, "stop_token_ids", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported by the engine plain"),
        ({"logprobs": 2}, "logprobs", "not supported"),
    ],
)
def test_wrong_sampling_is_refused(change: dict[str, object], field: str, said: str) -> None:
    sampling = replace(GOOD.sampling, **change)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=said) as caught:
        check(replace(GOOD, sampling=sampling), INFO)
    assert caught.value.field == field


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    info = replace(INFO, sampling=frozenset({"temperature", "logit_bias", "logprobs"}))
    sampling = replace(GOOD.sampling, logit_bias=((100, 1.0),))
    with pytest.raises(InvalidArgument, match="vocabulary size 100, not 100") as caught:
        check(replace(GOOD, sampling=sampling), info)
    assert caught.value.field == "logit_bias"


def test_capacity() -> None:
    check_capacity(4, INFO, 3, draining=False)
    with pytest.raises(ResourceExhausted, match=r"5 sequences .* \(limit 5\)") as caught:
        check_capacity(5, INFO, 3, draining=False)
    assert caught.value.retry_after_ms > 0
    with pytest.raises(Unavailable, match="draining"):
        check_capacity(0, INFO, 3, draining=True)
