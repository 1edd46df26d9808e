"""Log probabilities on their way into frames: with their tokens, before their sequence's
first one if they are the prompt's, within the frames' length and a bound."""

from __future__ import annotations

import random

from headrace.blocks import pack_tokens
from headrace.logprobs import record_len
from headrace.v1 import types_pb2, worker_pb2
from services.worker import sessions
from services.worker.dispatch import Sequences
from services.worker.engine import EngineInfo, StepOutput
from services.worker.sessions import Session

INFO = EngineInfo(
    engine="none",
    model_revision="r",
    tokenizer_digest="t",
    vocab_size=1000,
    context_len=1 << 20,
    block_size=16,
    total_blocks=8,
    max_sequences=10_000,
    eos_token_ids=(),
    resume="exact",
    sampling=frozenset({"temperature", "logprobs", "prompt_logprobs"}),
)
LENGTH = record_len(20)


class Engine:
    """Takes everything; its steps are made by the test."""

    def __init__(self) -> None:
        self.cancelled: list[int] = []

    def submit(self, request: object) -> None:
        """Nothing."""

    def cancel(self, sequence_ids: list[int]) -> None:
        self.cancelled += sequence_ids


class Setup:
    """A session with sequences in slots 10, 11, …, which the engine knows as 1, 2, …"""

    def __init__(self, count: int) -> None:
        self.engine = Engine()
        self.sequences = Sequences(self.engine, INFO, max_queued=10_000, worker_id="w")
        self.session = Session("s", "g", self.sequences)
        sampling = types_pb2.SamplingParams(
            temperature=0, seed=0, max_tokens=1 << 19, logprobs=20, prompt_logprobs=20
        )
        submissions = [
            worker_pb2.Submission(
                slot=10 + at,
                prompt_ids=pack_tokens([1]),
                sampling=sampling,
                namespace_key=bytes(16),
            )
            for at in range(count)
        ]
        self.session.receive(worker_pb2.AttachRequest(frame=1, submissions=submissions))

    def frames(self) -> list[worker_pb2.AttachResponse]:
        return list(iter(self.session.next_frame, None))


def record(number: int) -> bytes:
    return number.to_bytes(LENGTH, "little")


async def test_a_token_and_its_record_share_a_frame_and_a_prompts_come_first() -> None:
    """What a gateway puts together again, of steps that gathered while it did not read."""
    setup = Setup(40)
    rng = random.Random(1)
    scored = [number for number in range(1, 41) if number % 3]
    sent: dict[int, list[int]] = {}
    prompts = {number: b"".join(map(record, range(900))) for number in scored[:5]}
    for step in range(60):
        ids = [number for number in range(1, 41) if rng.random() < 0.8] if step > 20 else [3]
        tokens = [rng.randrange(1000) for _ in ids]
        output = StepOutput(
            step, ids, tokens,
            logprobs={at: record(t) for at, t in enumerate(tokens) if ids[at] in scored},
            prompt_logprobs={n: p[step * 50 * LENGTH : (step + 1) * 50 * LENGTH]
                             for n, p in prompts.items() if step < 18},
        )  # fmt: skip
        setup.sequences.on_step(output)
        for number, token in zip(ids, tokens, strict=True):
            sent.setdefault(number + 9, []).append(token)
    found: dict[int, list[int]] = {}
    prompt_scores: dict[int, bytes] = {}
    frames = setup.frames()
    assert len(frames) > 10
    for frame in frames:
        assert frame.ByteSize() <= sessions.FRAME_LEN + 64
        scores: dict[int, bytes] = {}
        for item in frame.logprobs:
            assert not item.prompt or item.slot not in found
            assert len(item.prompt) % LENGTH == 0
            scores[item.slot] = scores.get(item.slot, b"") + item.tokens
            prompt_scores[item.slot] = prompt_scores.get(item.slot, b"") + item.prompt
        for slot, token in zip(frame.slots, frame.token_ids, strict=True):
            found.setdefault(slot, []).append(token)
            if slot - 9 in scored:
                mine = scores[slot]
                assert mine[:LENGTH] == record(token)
                scores[slot] = mine[LENGTH:]
        assert not any(scores.values())
    assert found == sent
    assert {slot: data for slot, data in prompt_scores.items() if data} == {
        number + 9: data for number, data in prompts.items()
    }


async def test_without_a_reader_what_waits_is_bounded() -> None:
    setup = Setup(10)
    ids = list(range(1, 11)) * 10
    step = 0
    while not setup.engine.cancelled:
        step += 1
        scores = {at: bytes(LENGTH) for at in range(len(ids))}
        setup.sequences.on_step(StepOutput(step, ids, [5] * len(ids), logprobs=scores))
        waiting = sum(len(score.data) for score in setup.session._scores)
        assert waiting <= sessions.MAX_WAITING_SCORES_LEN + len(ids) * LENGTH
    ends = [end for frame in setup.frames() for end in frame.ends]
    assert {end.error.code for end in ends} == {8}
    assert len(ends) == 10
    assert not setup.session._scores


async def test_who_did_not_ask_pays_nothing() -> None:
    setup = Setup(3)
    setup.sequences.on_step(StepOutput(1, [1, 2, 3], [5, 6, 7]))
    (frame,) = setup.frames()
    assert list(frame.token_ids) == [5, 6, 7]
    assert not frame.logprobs
