"""Which prompt tokens a step scores: each but the first, once, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.params import SamplingParams
from services.worker.engine import SequenceRequest


def submit(engine: Any, number: int, prompt: list[int], **options: Any) -> None:
    """A sequence whose prompt is to be scored."""
    request = SequenceRequest(
        sequence_id=number,
        prompt_ids=prompt,
        generated_ids=options.pop("generated", []),
        sampling=SamplingParams(seed=0, max_tokens=options.pop("max_tokens", 3), prompt_logprobs=1),
        namespace_key=bytes(16),
        **options,
    )
    engine.requests[number] = request
    engine.outputs[number] = list(request.generated_ids)
    engine.core.submit([request])


def scored(engine: Any, number: int) -> list[int]:
    """All positions, in order; each is predicted by a token of the same chunk."""
    found = []
    for plan in engine.plans:
        for item in plan.scheduled:
            if item.sequence_id == number:
                assert all(item.start < p <= item.end for p in item.scored)
                found += item.scored
    return found


def test_a_prompt_is_scored_in_chunks(tiny: Callable[..., Any]) -> None:
    engine = tiny(num_blocks=16)
    prompt = [number % 4 for number in range(21)]
    submit(engine, 1, prompt)
    engine.drain()
    assert scored(engine, 1) == list(range(1, 21))


def test_what_is_cached_is_computed_again_to_be_scored(tiny: Callable[..., Any]) -> None:
    engine = tiny(num_blocks=16)
    prompt = [number % 4 for number in range(21)]
    engine.submit(prompt)
    engine.drain()
    submit(engine, 50, prompt)
    engine.drain()
    assert engine.ends[50].cached_tokens == 0
    assert scored(engine, 50) == list(range(1, 21))


def test_a_resumed_sequence_is_not_scored_and_finds_its_blocks(tiny: Callable[..., Any]) -> None:
    engine = tiny(num_blocks=16)
    prompt = [number % 4 for number in range(21)]
    engine.submit(prompt)
    engine.drain()
    submit(engine, 50, prompt, generated=engine.outputs[1][:1])
    engine.drain()
    assert engine.ends[50].cached_tokens == 20
    assert scored(engine, 50) == []


def test_a_prompt_of_one_token_has_nothing_to_score(tiny: Callable[..., Any]) -> None:
    engine = tiny()
    submit(engine, 1, [2])
    engine.drain()
    assert scored(engine, 1) == []


def test_preemption_repeats_no_score(tiny: Callable[..., Any]) -> None:
    """Two that grow beyond the blocks: the later one gives way, mid-prompt or behind it."""
    for length in range(8, 21):
        engine = tiny(num_blocks=8, max_step_tokens=6)
        submit(engine, 1, [1] * 8, max_tokens=16)
        submit(engine, 2, [2] * length, max_tokens=10)
        engine.drain()
        assert scored(engine, 1) == list(range(1, 8))
        assert scored(engine, 2) == list(range(1, length))
