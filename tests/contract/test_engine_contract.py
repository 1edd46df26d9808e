"""What every engine owes the worker around it, on each entry of the table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from headrace.blocks import block_ids, namespace_key, pack_tokens, short_id
from headrace.logprobs import unpack
from headrace.params import SamplingParams
from services.worker.engine import EngineConfig, SequenceRequest
from services.worker.engines import ENGINES, create

if TYPE_CHECKING:
    from collections.abc import Iterator

    from headrace.models.files import ModelFiles
    from services.worker.engine import Engine, EngineInfo, SequenceEnd, StepOutput

NAMESPACE = namespace_key("contract")
#: "Once upon a time, there was a little girl named Lily. She", for SmolLM2.
STORY = [6403, 1980, 253, 655, 28, 665, 436, 253, 1838, 8180, 3365, 14176, 30, 2306]


@dataclass
class Driver:
    """One engine, what was asked of it, and the sum of what its steps brought."""

    engine: Engine
    outputs: dict[int, list[int]] = field(default_factory=dict)
    #: Packed log probabilities by sequence, of the output and of the prompt.
    scores: dict[int, bytes] = field(default_factory=dict)
    prompt_scores: dict[int, bytes] = field(default_factory=dict)
    ends: dict[int, SequenceEnd] = field(default_factory=dict)
    owned: set[int] = field(default_factory=set)
    num_steps: int = 0
    _ids: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def request(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        generated: list[int] | None = None,
        namespace: bytes = NAMESPACE,
        **sampling: Any,
    ) -> SequenceRequest:
        """A greedy request of a new id."""
        params = {"temperature": 0.0, "seed": 7, **sampling}
        return SequenceRequest(
            sequence_id=next(self._ids),
            prompt_ids=prompt,
            generated_ids=generated or [],
            sampling=SamplingParams(max_tokens=max_tokens, **params),
            namespace_key=namespace,
        )

    def submit(self, *requests: SequenceRequest) -> None:
        for request in requests:
            self.outputs[request.sequence_id] = list(request.generated_ids)
        self.engine.submit(requests)

    def step(self) -> StepOutput:
        """One step; what it says must fit what was said before."""
        output = self.engine.step()
        for sequence_id, token in zip(output.sequence_ids, output.token_ids, strict=True):
            assert sequence_id not in self.ends
            assert 0 <= token < self.info.vocab_size
            self.outputs[sequence_id].append(token)
        for at, data in output.logprobs.items():
            sequence_id = output.sequence_ids[at]
            self.scores[sequence_id] = self.scores.get(sequence_id, b"") + data
        for sequence_id, data in output.prompt_logprobs.items():
            self.prompt_scores[sequence_id] = self.prompt_scores.get(sequence_id, b"") + data
        for end in output.ends:
            assert end.sequence_id not in self.ends
            assert end.completion_tokens == len(self.outputs[end.sequence_id])
            assert min(end.queue_ms, end.prefill_ms, end.decode_ms) >= 0
            self.ends[end.sequence_id] = end
        assert not self.owned & set(output.stored)
        assert self.owned >= set(output.removed)
        self.owned = (self.owned | set(output.stored)) - set(output.removed)
        assert sorted(self.owned) == sorted(self.engine.owned_blocks())
        assert output.step > self.num_steps
        self.num_steps = output.step
        return output

    def drain(self) -> None:
        for _ in range(1000):
            if not self.engine.has_work():
                break
            self.step()
        assert not self.engine.has_work()
        stats = self.engine.stats()
        assert (stats.active_sequences, stats.queued_sequences, stats.used_blocks) == (0, 0, 0)
        assert stats.queued_prefill_tokens == 0

    def run(self, *args: Any, **options: Any) -> tuple[list[int], SequenceEnd]:
        """One request, alone: its tokens and its end."""
        request = self.request(*args, **options)
        self.submit(request)
        self.drain()
        return self.outputs[request.sequence_id], self.ends[request.sequence_id]


@pytest.fixture(scope="module", params=sorted(ENGINES))
def driver(request: pytest.FixtureRequest, smollm2: ModelFiles) -> Iterator[Driver]:
    """Small limits, so that chunks, queues, evictions and preemptions happen."""
    config = EngineConfig(
        model_path=str(smollm2.path),
        model_name=smollm2.name,
        dtype="float32",
        device="cpu",
        num_threads=2,
        num_blocks=10,
        context_len=160,
        max_step_tokens=32,
        max_sequences=3,
        sim_step_ms=1.0,
        sim_prefill_ms_per_token=0.05,
    )
    engine = create(request.param, config, lambda phase, fraction: None)
    yield Driver(engine)
    engine.close()


def story(length: int, first: int) -> list[int]:
    """A prompt of its own: prompts that begin alike would meet in the cache."""
    return ([first] + STORY * length)[:length]


def test_info_says_what_the_engine_is(driver: Driver, smollm2: ModelFiles) -> None:
    info = driver.info
    assert info.model_revision == smollm2.revision()
    assert info.tokenizer_digest == smollm2.tokenizer_digest()
    assert (info.vocab_size, info.eos_token_ids) == (49152, (2,))
    assert (info.block_size, info.total_blocks, info.context_len) == (16, 10, 160)
    assert info.max_sequences == 3
    assert info.resume in {"exact", "semantic"}
    assert {"temperature", "top_p", "seed", "max_tokens", "stop_token_ids"} <= info.sampling


def test_a_sequence_brings_its_tokens_and_then_its_end(driver: Driver) -> None:
    tokens, end = driver.run(story(40, 100), max_tokens=5)
    assert len(tokens) == 5
    assert (end.reason, end.stopped_by_token, end.error) == ("length", False, "")
    assert (end.prompt_tokens, end.completion_tokens, end.cached_tokens) == (40, 5, 0)


def test_a_second_submit_finds_its_full_blocks_and_the_same_tokens(driver: Driver) -> None:
    prompt = story(48, 101)
    first, _ = driver.run(prompt)
    second, end = driver.run(prompt)
    assert end.cached_tokens == 32
    assert second == first
    _, end = driver.run([*prompt, *first, 5, 6])
    assert end.cached_tokens == 48


def test_the_next_turn_finds_the_answer_too(driver: Driver) -> None:
    prompt = story(20, 102)
    answer, _ = driver.run(prompt, max_tokens=14)
    turn = [*prompt, *answer, 40, 41]
    _, end = driver.run(turn)
    assert end.cached_tokens == 32
    ids = block_ids(pack_tokens(turn[:32]), 16, NAMESPACE)
    assert {short_id(block_id) for block_id in ids} <= driver.owned


def test_namespaces_share_nothing(driver: Driver) -> None:
    prompt = story(20, 103)
    driver.run(prompt)
    _, end = driver.run(prompt, namespace=namespace_key("contract", tenant_salt=b"other"))
    assert end.cached_tokens == 0


def test_a_cancelled_sequence_ends_within_one_step(driver: Driver) -> None:
    requests = [driver.request(story(20, 104 + number), max_tokens=50) for number in range(5)]
    driver.submit(*requests)
    driver.step()
    driver.step()
    ids = [request.sequence_id for request in requests]
    driver.engine.cancel([*ids, 10**9])
    output = driver.step()
    assert {end.sequence_id: end.reason for end in output.ends} == dict.fromkeys(ids, "cancelled")
    assert output.token_ids == []
    driver.drain()


def test_one_of_many_can_be_cancelled(driver: Driver) -> None:
    kept, lost = driver.request(story(9, 110), 6), driver.request(story(9, 111), 60)
    driver.submit(kept, lost)
    driver.step()
    driver.engine.cancel([lost.sequence_id])
    driver.drain()
    assert driver.ends[kept.sequence_id].reason == "length"
    assert len(driver.outputs[kept.sequence_id]) == 6


def test_a_stop_token_is_the_last_one_delivered(driver: Driver) -> None:
    prompt = story(20, 112)
    free, _ = driver.run(prompt, max_tokens=6)
    stop = free[3]
    tokens, end = driver.run(prompt, max_tokens=6, stop_token_ids=(stop,), ignore_eos=True)
    assert tokens == free[: free.index(stop) + 1]
    assert (end.reason, end.stopped_by_token) == ("stop", True)


def test_a_stop_sequence_ends_it_when_complete(driver: Driver) -> None:
    prompt = story(20, 140)
    free, _ = driver.run(prompt, max_tokens=8, ignore_eos=True)
    stop = tuple(free[2:5])
    end_at = next(n for n in range(3, 9) if tuple(free[n - 3 : n]) == stop)
    sampling = {"stop_token_sequences": ((*stop[:2], 1), stop), "ignore_eos": True}
    tokens, end = driver.run(prompt, 8, **sampling)
    assert tokens == free[:end_at]
    assert (end.reason, end.stopped_by_token) == ("stop", False)
    # Also where the sequence was resumed in the middle of it; the prompt's tokens don't count.
    tokens, end = driver.run(prompt, 8, generated=free[: end_at - 1], **sampling)
    assert (tokens, end.reason) == (free[:end_at], "stop")
    tokens, end = driver.run([*prompt, *free[: end_at - 1]], 1, **sampling)
    assert (tokens, end.reason) == ([free[end_at - 1]], "length")


def test_every_token_brings_its_log_probability(driver: Driver) -> None:
    if "logprobs" not in driver.info.sampling:
        pytest.skip("not supported")
    prompt = story(20, 141)
    request = driver.request(prompt, 6, logprobs=3, ignore_eos=True)
    silent = driver.request(prompt, 6, ignore_eos=True)
    driver.submit(request, silent)
    driver.drain()
    tokens = driver.outputs[request.sequence_id]
    assert tokens == driver.outputs[silent.sequence_id]
    assert silent.sequence_id not in driver.scores
    records = unpack(driver.scores[request.sequence_id], 3)
    assert [record.chosen[0] for record in records] == tokens
    for record in records:
        # Greedy: what was chosen is the likeliest.
        assert record.chosen == record.top[0]
        values = [value for _, value in record.top]
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) < 1.5
    # A resumed sequence brings those of its new tokens only, the same ones.
    resumed = driver.request(prompt, 6, generated=tokens[:4], logprobs=3, ignore_eos=True)
    driver.submit(resumed)
    driver.drain()
    again = unpack(driver.scores[resumed.sequence_id], 3)
    assert [record.chosen[0] for record in again] == tokens[4:]
    for old, new in zip(records[4:], again, strict=True):
        assert new.chosen[1] == pytest.approx(old.chosen[1], abs=1e-3)


def test_the_prompt_is_scored_once_from_its_second_token_on(driver: Driver) -> None:
    if "prompt_logprobs" not in driver.info.sampling:
        pytest.skip("not supported")
    # In chunks of 32, with its blocks cached, and beside another.
    prompt = story(70, 142)
    driver.run(prompt)
    request = driver.request(prompt, 3, prompt_logprobs=2)
    driver.submit(request, driver.request(story(20, 143), 3))
    driver.drain()
    records = unpack(driver.prompt_scores[request.sequence_id], 2)
    assert [record.chosen[0] for record in records] == prompt[1:]
    # The model's prediction for what follows is the one that a shorter prompt brings.
    shorter = driver.request(prompt[:50], 1, logprobs=2)
    driver.submit(shorter)
    driver.drain()
    (record,) = unpack(driver.scores[shorter.sequence_id], 2)
    assert record.top[0][0] == records[49].top[0][0]
    assert record.top[0][1] == pytest.approx(records[49].top[0][1], abs=1e-3)
    resumed = driver.request(prompt, 3, generated=[5], prompt_logprobs=2)
    driver.submit(resumed)
    driver.drain()
    assert resumed.sequence_id not in driver.prompt_scores


def test_no_end_token_comes_before_min_tokens(driver: Driver) -> None:
    if "min_tokens" not in driver.info.sampling:
        pytest.skip("not supported")
    prompt = story(20, 144)
    free, _ = driver.run(prompt, max_tokens=8)
    stops = tuple(free[:2])
    tokens, end = driver.run(prompt, 8, stop_token_ids=stops, min_tokens=5)
    assert not set(tokens[:5]) & {*stops, *driver.info.eos_token_ids}
    resumed, _ = driver.run(prompt, 8, generated=tokens[:3], stop_token_ids=stops, min_tokens=5)
    assert resumed == tokens
    assert end.completion_tokens >= 5


def test_penalties_go_on_where_a_sequence_is_resumed(driver: Driver) -> None:
    if "frequency_penalty" not in driver.info.sampling:
        pytest.skip("not supported")
    prompt = story(20, 145)
    sampling = {
        "repetition_penalty": 1.3, "frequency_penalty": 1.0, "presence_penalty": 0.5,
        "logit_bias": ((30, 3.0),), "bad_token_sequences": ((28, 281),), "ignore_eos": True,
    }  # fmt: skip
    tokens, _ = driver.run(prompt, 16, **sampling)
    resumed, _ = driver.run(prompt, 16, generated=tokens[:7], **sampling)
    assert resumed == tokens
    free, _ = driver.run(prompt, 16, ignore_eos=True)
    assert tokens != free


def test_a_resumed_sequence_goes_on_with_the_same_tokens(driver: Driver) -> None:
    prompt = story(30, 113)
    whole, _ = driver.run(prompt, max_tokens=8)
    other = namespace_key("elsewhere")
    for namespace, cached in ((NAMESPACE, 32), (other, 0)):
        tokens, end = driver.run(prompt, 8, generated=whole[:5], namespace=namespace)
        assert tokens == whole
        assert (end.prompt_tokens, end.completion_tokens) == (30, 8)
        assert end.cached_tokens == cached


def test_a_resume_that_was_complete_ends_at_once(driver: Driver) -> None:
    request = driver.request(story(10, 114), 3, generated=[5, 6, 7])
    driver.submit(request)
    output = driver.step()
    assert output.token_ids == []
    assert [(end.sequence_id, end.reason) for end in output.ends] == [
        (request.sequence_id, "length")
    ]


def test_sampling_with_one_seed_repeats(driver: Driver) -> None:
    prompt = story(20, 115)
    sampling = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
    first, _ = driver.run(prompt, **sampling)
    assert driver.run(prompt, **sampling)[0] == first


def test_more_sequences_than_slots_and_blocks_all_complete(driver: Driver) -> None:
    # Two blocks each at first, four at the end: ten hold three only at first.
    prompts = [story(28 + number, 120 + number) for number in range(4)]
    requests = [driver.request(prompt, 24, ignore_eos=True) for prompt in prompts]
    driver.submit(*requests)
    most_active, queued_again = 0, False
    before = driver.engine.stats()
    while driver.engine.has_work():
        driver.step()
        stats = driver.engine.stats()
        most_active = max(most_active, stats.active_sequences)
        # Nothing new was submitted: whoever joins the queue was preempted.
        queued_again |= stats.queued_sequences > before.queued_sequences > 0
        before = stats
        assert stats.used_blocks <= stats.total_blocks == 10
    assert most_active == 3
    assert queued_again
    for request in requests:
        end = driver.ends[request.sequence_id]
        assert (end.reason, end.completion_tokens) == ("length", 24)
    if driver.info.resume == "exact":
        for prompt, request in zip(prompts, requests, strict=True):
            alone, _ = driver.run(prompt, 24, ignore_eos=True)
            assert driver.outputs[request.sequence_id] == alone


def test_bad_requests_end_with_an_error_and_harm_nobody(driver: Driver) -> None:
    good = driver.request(story(10, 130))
    bad = {
        "prompt_ids must not be empty": driver.request([]),
        "160 tokens, not 160": driver.request([5] * 160),
        "160 tokens, not 161": driver.request([5] * 150, 100, generated=[5] * 11),
        "vocabulary size 49152, not 49152": driver.request([5, 49152]),
        "stop_token_ids: token ids must be below the vocabulary size 49152, not 50000": (
            driver.request([5], stop_token_ids=(50000,))
        ),
        "namespace_key must be 16 bytes, not 3": driver.request([5], namespace=b"abc"),
    }
    driver.submit(good, *bad.values())
    driver.step()
    for text, request in bad.items():
        end = driver.ends[request.sequence_id]
        assert end.reason == "error"
        assert text in end.error
    driver.drain()
    assert driver.ends[good.sequence_id].reason == "length"


def test_a_sequence_ends_with_the_context(driver: Driver) -> None:
    tokens, end = driver.run(story(156, 131), max_tokens=50, ignore_eos=True)
    assert (end.reason, len(tokens)) == ("length", 4)


def test_an_idle_engine_has_no_work(driver: Driver) -> None:
    assert not driver.engine.has_work()
    output = driver.step()
    assert (output.sequence_ids, output.ends, output.stored, output.removed) == ([], [], [], [])
