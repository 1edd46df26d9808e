"""Calibration from what steps report: convergence, mixed steps, bounds, outliers."""

from __future__ import annotations

import random
from dataclasses import astuple, fields
from math import inf, isfinite, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.latency_model import PEER_ROWS, LatencyModel, Timing, Totals, prior_of

CAPACITY = 16_384 * 64
STEP_TOKENS = 8192


def polynomial_prefill(tokens: int) -> float:
    """Dynamo's mocker, see the peers' facts."""
    return 4.209989e-7 * tokens**2 + 1.518344e-2 * tokens + 16.50142 if tokens else 0.0


def polynomial_decode(context: int) -> float:
    share = min(1.0, context / CAPACITY)
    return max(1.0, -25.74 * share**2 + 54.01 * share + 5.74) if context else 0.0


def add(totals: Totals, **more: float) -> Totals:
    return Totals(*(getattr(totals, f.name) + more.get(f.name, 0) for f in fields(Totals)))


def step(random_: random.Random, slowness: float = 1.0) -> dict[str, float]:
    """What one step adds: of prompts, decodes, or both, with 3 % of noise."""
    kind = random_.choice(("prefill", "decode", "mixed"))
    chunks, left = [], STEP_TOKENS
    for _ in range(random_.choice((1, 1, 2)) if kind != "decode" else 0):
        count = min(left, int(random_.lognormvariate(8, 1.2)) + 1)
        if count:
            chunks.append((count, random_.choice((0, 512, 4096))))
            left -= count
    decodes = random_.randint(5, 90) if kind != "prefill" else 0
    context = sum(random_.randint(1000, 20_000) for _ in range(decodes))
    prefill_ms = polynomial_prefill(sum(count for count, _ in chunks))
    return {
        "step_ms": (prefill_ms + polynomial_decode(context))
        * random_.uniform(0.97, 1.03)
        * slowness,
        "prefill_steps": bool(chunks),
        "prefill_tokens": sum(count for count, _ in chunks),
        "prefill_squares": sum(count**2 for count, _ in chunks),
        "prefill_context": sum(count * start for count, start in chunks),
        "decode_steps": bool(decodes),
        "decode_sequences": decodes,
        "decode_context": context,
    }


def run(
    model: LatencyModel, totals: Totals, num_steps: int, seed: int, slow: float = 1.0
) -> Totals:
    random_ = random.Random(seed)
    for _ in range(num_steps):
        totals = add(totals, **step(random_, slow))
        take(model, totals)
    return totals


def take(model: LatencyModel, totals: Totals) -> None:
    new = model.observe(totals)
    if new is not None:
        model.learn(new)


def check_polynomial(
    timing: Timing, slow: float = 1.0, within: float = 0.06, decode_within: float = 0.1
) -> None:
    for tokens in (1000, 4000, 8192):
        assert timing.prefill_ms(tokens) == pytest.approx(
            polynomial_prefill(tokens) * slow, rel=within
        )
    for sequences in (20, 40, 80):
        context = sequences * 10_500
        assert timing.decode_ms(sequences, context) == pytest.approx(
            polynomial_decode(context) * slow, rel=decode_within
        )


@pytest.mark.parametrize("seed", range(3))
def test_converges_to_the_mockers_polynomial_from_mixed_steps(seed: int) -> None:
    model = LatencyModel()
    assert not model.timing.calibrated
    run(model, Totals(), 600, seed)
    assert model.timing.calibrated
    check_polynomial(model.timing)
    chunked = 2 * polynomial_prefill(8192) + polynomial_prefill(3616)
    assert model.timing.prefill_ms(20_000) == pytest.approx(chunked, rel=0.06)


def test_learns_attention_over_cached_tokens() -> None:
    model, totals, random_ = LatencyModel(), Totals(), random.Random(1)
    for _ in range(300):
        count, start = random_.randint(50, 2000), random_.randint(0, 30_000)
        totals = add(
            totals, step_ms=5 + 0.05 * count + 2e-6 * count * (count + 2 * start),
            prefill_steps=1, prefill_tokens=count, prefill_squares=count**2,
            prefill_context=count * start,
        )  # fmt: skip
        take(model, totals)
    expected = 5 + 0.05 * 1000 + 2e-6 * 1000 * 41_000
    assert model.timing.prefill_ms(1000, 20_000) == pytest.approx(expected, rel=0.05)


def test_one_outlier_does_no_harm_and_a_lasting_change_is_learned() -> None:
    model = LatencyModel()
    totals = run(model, Totals(), 600, 5)
    before = model.timing.prefill_ms(4000)
    totals = add(totals, **{**step(random.Random(1)), "step_ms": 60_000.0})
    take(model, totals)
    assert model.timing.prefill_ms(4000) == pytest.approx(before, rel=0.05)
    run(model, totals, 3000, 6, slow=3.0)
    check_polynomial(model.timing, slow=3.0, within=0.1, decode_within=0.2)


NUMBERS = st.integers(0, 10**9)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.builds(
            Totals,
            st.one_of(st.floats(0, 1e9), st.sampled_from([inf, nan])),
            *[NUMBERS] * 7,
        ),
        max_size=20,
    )
)
def test_is_never_negative_or_infinite_whatever_is_reported(rows: list[Totals]) -> None:
    model, totals = LatencyModel(), Totals()
    for row in rows:
        summed = [a + b for a, b in zip(astuple(totals), astuple(row), strict=True)]
        take(model, Totals(*summed))
        if isfinite(row.step_ms):
            totals = Totals(*summed)
        assert all(isfinite(value) and value >= 0 for value in model.timing)


def test_totals_that_fell_are_those_of_a_new_start() -> None:
    model = LatencyModel()
    run(model, Totals(), 600, 7)
    run(model, Totals(), 600, 8)
    check_polynomial(model.timing)


def test_idle_reports_teach_nothing() -> None:
    model = LatencyModel()
    take(model, Totals())
    take(model, Totals(step_ms=1000.0))
    assert model.timing == Timing()


def test_the_prior_is_the_engines() -> None:
    assert prior_of("sim") == Timing()
    assert prior_of("tensorrt_llm").prefill_ms_per_token < Timing().prefill_ms_per_token


def test_peers_are_the_prior_until_the_worker_itself_says_otherwise() -> None:
    peers = LatencyModel()
    run(peers, Totals(), 600, 9)
    model = LatencyModel(peers.timing._replace(calibrated=False))
    assert model.timing.prefill_ms(4000) == peers.timing.prefill_ms(4000)
    model.expect(peers.timing, PEER_ROWS)
    totals = run(model, Totals(), 4, 10, slow=1.3)
    # A few steps may be chance.
    assert model.timing.prefill_ms(4000) < 1.15 * peers.timing.prefill_ms(4000)
    run(model, totals, 600, 11, slow=1.3)
    check_polynomial(model.timing, slow=1.3, decode_within=0.15)
