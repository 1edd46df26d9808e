"""Penalties, biases, bans and log probabilities, each against a twin written plainly.

Also that none of them depends on what else is in the batch, on what the sampler
saw before, or on where a sequence was resumed.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.logprobs import TokenLogprobs, pack, unpack
from headrace.params import SamplingParams
from services.worker.engines.torch.sampling import Sampler, score_prompts
from services.worker.plan import ScheduledSequence, StepPlan

VOCAB = 30
ENDS = frozenset({0, 7})


def scheduled(
    params: SamplingParams,
    prompt: list[int],
    generated: list[int] | None = None,
    sequence_id: int = 1,
    ends: frozenset[int] = ENDS,
) -> ScheduledSequence:
    """A sequence that decodes its next token."""
    tokens = prompt + (generated or [])
    return ScheduledSequence(
        sequence_id, tokens[-1:], len(tokens) - 1, [], True, params,
        tokens=tokens, num_prompt_tokens=len(prompt), end_token_ids=ends,
    )  # fmt: skip


def plain_logits(logits: list[float], item: ScheduledSequence) -> list[float]:
    """One row after all that comes before temperature."""
    params, values = item.sampling, list(logits)
    prompt, output = item.tokens[: item.num_prompt_tokens], item.tokens[item.num_prompt_tokens :]
    for ids in params.bad_token_sequences:
        before = list(ids[:-1])
        if not before or list(output)[-len(before) :] == before:
            values[ids[-1]] = float("-inf")
    if len(output) < params.min_tokens:
        for token in item.end_token_ids:
            values[token] = float("-inf")
    for token, bias in params.logit_bias:
        values[token] += bias
    counts = Counter(output)
    for token in {*prompt, *output}:
        value = values[token]
        repetition = params.repetition_penalty
        value = value / repetition if value > 0 else value * repetition
        value -= params.frequency_penalty * counts[token]
        values[token] = value - params.presence_penalty * (counts[token] > 0)
    return values


def processed(logits: torch.Tensor, items: list[ScheduledSequence]) -> torch.Tensor:
    """What a new sampler makes of the logits."""
    logits = logits.clone()
    Sampler().sample(logits, items)
    return logits


PROMPT, OUTPUT = [3, 3, 4, 9], [4, 5, 5, 5, 6]


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.7},
        {"repetition_penalty": 1.2, "presence_penalty": -2.0, "frequency_penalty": 0.3},
        {"logit_bias": ((3, 100.0), (8, -2.5))},
        {"min_tokens": 5},
        {"min_tokens": 6},
        {"bad_token_sequences": ((4,), (5, 6, 8), (5, 8), (6, 2))},
        {"bad_token_sequences": ((9, 4), (3, 4, 9, 4, 5, 5, 5, 6, 1))},
        {"logit_bias": ((5, 2.0),), "repetition_penalty": 2.0, "bad_token_sequences": ((5,),)},
    ],
    ids=str,
)
def test_logits_are_changed_as_a_plain_twin_does(params: dict[str, Any]) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    item = scheduled(SamplingParams(temperature=0, **params), PROMPT, OUTPUT)
    expected = torch.tensor([plain_logits(logits[0].tolist(), item)])
    torch.testing.assert_close(processed(logits, [item]), expected)


def test_a_bad_sequence_counts_in_the_output_only() -> None:
    logits = torch.zeros(1, VOCAB)
    params = SamplingParams(temperature=0, bad_token_sequences=((9, 4),))
    assert processed(logits, [scheduled(params, [3, 9])]).isfinite().all()
    assert processed(logits, [scheduled(params, [3], [9])])[0, 4] == -torch.inf


some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([0.8, 1.0]),
    seed=st.integers(0, 100),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 0.25]),
    logit_bias=st.sampled_from([(), ((3, 2.0), (4, -1.0))]),
    min_tokens=st.sampled_from([0, 3]),
    bad_token_sequences=st.sampled_from([(), ((1,), (2, 3))]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(some_params, min_size=1, max_size=6),
    seed=st.integers(0, 1 << 32),
    data=st.data(),
)
def test_history_company_and_resuming_change_nothing(
    params: list[SamplingParams], seed: int, data: st.DataObject
) -> None:
    """One sampler over changing batches against a new one for each row and step."""
    rng = random.Random(seed)
    sampler = Sampler()
    outputs: dict[int, list[int]] = {row: [] for row in range(len(params))}
    prompts = {row: [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for row in outputs}
    tokens = {row: list(prompts[row]) for row in outputs}
    for _ in range(8):
        rows = data.draw(st.lists(st.sampled_from(sorted(outputs)), unique=True, min_size=1))
        logits = torch.tensor([[rng.gauss(0, 2) for _ in range(VOCAB)] for _ in rows])
        items = [
            scheduled(params[row], prompts[row], outputs[row], row)._replace(tokens=tokens[row])
            for row in rows
        ]
        together = logits.clone()
        result = sampler.sample(together, items)
        for at, row in enumerate(rows):
            alone = logits[at : at + 1].clone()
            resumed = scheduled(params[row], prompts[row], outputs[row], row + 100)
            single = Sampler().sample(alone, [resumed])
            assert torch.equal(together[at], alone[0])
            assert single.token_ids == [result.token_ids[at]]
            assert single.logprobs.get(0) == result.logprobs.get(at)
            expected = torch.tensor(plain_logits(logits[at].tolist(), resumed))
            torch.testing.assert_close(together[at], expected)
            outputs[row].append(result.token_ids[at])
            tokens[row].append(result.token_ids[at])


def test_another_sequence_of_the_same_number_starts_from_its_own_tokens() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(temperature=0, frequency_penalty=1.0)
    sampler = Sampler()
    for output in ([4, 4, 4], [5, 5, 5, 5]):
        found = logits.clone()
        item = scheduled(params, [1], output)
        sampler.sample(found, [item])
        torch.testing.assert_close(found, torch.tensor([plain_logits(logits[0].tolist(), item)]))


def test_many_come_and_go_and_counts_stay_bounded() -> None:
    params = SamplingParams(temperature=0, presence_penalty=1.0)
    sampler = Sampler()
    for number in range(50):
        items = [scheduled(params, [1, 2], [3], number + at) for at in range(3)]
        sampler.sample(torch.zeros(3, VOCAB), items)
    assert sampler._penalties is not None
    assert len(sampler._penalties._counts) <= 4


def test_a_mask_comes_first_and_binds() -> None:
    def only_two(logits: torch.Tensor) -> None:
        logits[:, [token for token in range(VOCAB) if token not in {3, 5}]] = -torch.inf

    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(3))
    items = [scheduled(SamplingParams(seed=at), [1], sequence_id=at) for at in range(40)]
    items[0] = scheduled(SamplingParams(temperature=0, logit_bias=((9, 100.0),)), [1])
    result = Sampler().sample(logits, items, only_two)
    assert set(result.token_ids) == {3, 5}


@pytest.mark.parametrize("vocab_size", [VOCAB, 4096])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_logprobs_are_the_models_own(vocab_size: int, temperature: float) -> None:
    """Whatever is done to the logits afterwards."""
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(4)) * 3
    expected = logits.double().log_softmax(-1)
    params = SamplingParams(temperature, seed=3, logit_bias=((5, 100.0),), top_k=2)
    counts = [None, 0, 20, 3]
    items = [
        scheduled(replace(params, logprobs=count), [1], sequence_id=at)
        for at, count in enumerate(counts)
    ]
    result = Sampler().sample(logits, items)
    assert result.token_ids == [5, 5, 5, 5]
    assert sorted(result.logprobs) == [1, 2, 3]
    for row, data in result.logprobs.items():
        count = counts[row] or 0
        (record,) = unpack(data, count)
        assert record.chosen[0] == 5
        assert record.chosen[1] == pytest.approx(float(expected[row, 5]), abs=1e-5)
        best = expected[row].sort(descending=True)
        assert [token for token, _ in record.top] == best.indices[:count].tolist()
        assert [value for _, value in record.top] == pytest.approx(
            best.values[:count].tolist(), abs=1e-5
        )


def test_records_are_packed_as_the_plain_form_says() -> None:
    records = [
        TokenLogprobs((7, -0.5), [(7, -0.5), (1, -1.5)]),
        TokenLogprobs((2, -3.0), [(1 << 31, -0.25), (3, -2.0)]),
    ]
    assert unpack(pack(records), 2) == records


def test_a_prompt_is_scored_whatever_its_chunks() -> None:
    """The head is a table of logits by token; positions' scores come from the token before."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    expected = table.double().log_softmax(-1)
    rng = random.Random(6)
    prompt = [rng.randrange(VOCAB) for _ in range(150)]
    params = SamplingParams(prompt_logprobs=2)
    other = scheduled(SamplingParams(), [1, 2])
    data = b""
    for start, end in ((0, 70), (70, 71), (71, 150)):
        scores = range(max(1, start + 1), min(end + 1, len(prompt)))
        item = ScheduledSequence(
            5, prompt[start:end], start, [], False, params, tokens=prompt, scored=scores
        )
        plan = StepPlan([other, item])
        hidden = torch.tensor([2, *prompt[start:end]])
        data += score_prompts(plan, hidden, lambda states: table[states])[5]
    records = unpack(data, 2)
    assert [record.chosen[0] for record in records] == prompt[1:]
    for before, record in zip(prompt, records, strict=False):
        token, value = record.chosen
        assert value == pytest.approx(float(expected[before, token]), abs=1e-5)
        assert record.top[0][1] == pytest.approx(float(expected[before].max()), abs=1e-5)
