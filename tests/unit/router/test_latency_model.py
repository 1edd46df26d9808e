from __future__ import annotations

import pytest

from services.router.latency_model import (
    PREFILL_HALF_LIFE,
    PRIOR_PREFILL_MS_PER_TOKEN,
    LatencyModel,
    Timing,
    Totals,
)


def test_before_any_step_the_prior_stands() -> None:
    model = LatencyModel()
    assert model.timing == Timing()
    assert not model.timing.calibrated
    model.observe(Totals())
    assert not model.timing.calibrated


def test_it_learns_from_differences_of_totals() -> None:
    model = LatencyModel()
    for n in range(1, 21):
        model.observe(Totals(n * 4096, n * 4096 * 0.7, n * 100, n * 100 * 33.0))
    assert model.timing.calibrated
    assert model.timing.prefill_ms_per_token == pytest.approx(0.7, rel=0.01)
    assert model.timing.decode_step_ms == pytest.approx(33.0, rel=0.01)


def test_old_steps_fade_by_half() -> None:
    model = LatencyModel(Timing(prefill_ms_per_token=1.0))
    model.observe(Totals(100_000_000, 100_000_000 * 1.0))
    model.observe(Totals(100_000_000 + 10 * PREFILL_HALF_LIFE, 100_000_000.0))
    # Ten half-lives at no cost: 100 million tokens at 1 ms weigh as 97,656.
    assert model.timing.prefill_ms_per_token == pytest.approx(
        (100_000_000 / 1024) / (100_000_000 / 1024 + 10 * PREFILL_HALF_LIFE), rel=0.01
    )


def test_totals_that_fell_begin_anew() -> None:
    model = LatencyModel()
    model.observe(Totals(50_000, 50_000 * 0.5))
    model.observe(Totals(100_000, 100_000 * 0.5))
    model.observe(Totals(1_000_000, 1_000_000 * 0.5))
    model.observe(Totals(16_384, 16_384 * 0.5))
    assert model.timing.prefill_ms_per_token == pytest.approx(0.5, rel=0.01)


def test_prefill_has_a_linear_and_a_quadratic_part() -> None:
    timing = Timing(prefill_ms_per_token=PRIOR_PREFILL_MS_PER_TOKEN)
    whole = timing.prefill_ms(2000)
    assert whole > 2000 * PRIOR_PREFILL_MS_PER_TOKEN
    assert timing.prefill_ms(0, 2000) == 0
    # In two runs it costs what it costs in one.
    assert timing.prefill_ms(1200) + timing.prefill_ms(800, 1200) == pytest.approx(whole)
