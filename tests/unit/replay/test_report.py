"""Sums over results: percentiles, spread, the floor, and what tables and JSON make of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from services.replay.floor import alone_ttft_ms
from services.replay.report import MAX_ERRORS, PERCENTILES, Latency, as_json, grouped, summarize
from services.replay.simulation import SimulationConfig
from services.replay.tables import tables
from services.worker.engines.sim.timing import create
from tests.unit.replay.results import result


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), min_size=1, max_size=40))
def test_percentiles_are_those_of_the_values_written_out(pairs: list[tuple[int, int]]) -> None:
    values, counts = (np.array(column) for column in zip(*pairs, strict=True))
    latency = Latency.of(values.astype(float), counts)
    written = sorted(value for value, count in pairs for _ in range(count))
    for name, percent in PERCENTILES.items():
        # The smallest value that at least so many do not exceed.
        least = next(
            v for v in written if 100 * sum(w <= v for w in written) >= percent * len(written)
        )
        assert getattr(latency, name) == least
    assert latency.count == len(written)
    assert latency.mean == pytest.approx(sum(written) / len(written))
    assert latency.max == written[-1]


def test_nothing_measured_is_nan() -> None:
    assert math.isnan(Latency.of(np.array([math.nan])).p99)
    assert Latency.of(np.array([])).count == 0


def test_what_got_no_token_is_left_out() -> None:
    report = summarize(result([10.0, math.nan, 30.0], errors={"no worker": 1}))
    assert (report.ttft.count, report.ttft.mean) == (2, 20.0)
    assert (report.requests, report.completed, report.failed, report.refused) == (3, 2, 1, 0)
    shown = Console(width=140)
    with shown.capture() as capture:
        shown.print(tables([report]))
    assert "kv ×1: 1 × no worker" in capture.get()


def test_many_causes_are_grouped_by_their_words() -> None:
    few = {"limit 3": 1, "limit 4": 5}
    assert list(grouped(few).items()) == [("limit 4", 5), ("limit 3", 1)]
    many = {f"{n} tokens, limit 4": 2 for n in range(MAX_ERRORS + 1)} | {"gone": 30}
    assert grouped(many) == {"gone": 30, "N tokens, limit N": 2 * (MAX_ERRORS + 1)}
    assert len(grouped({"x" * n: 1 for n in range(1, 40)})) == MAX_ERRORS


def test_figures() -> None:
    report = summarize(
        result([10.0, 20.0, 30.0], speed=2.0, cached=250, migrations=np.array([0, 2, 0]))
    )
    assert report.reuse_ratio == 0.25
    assert report.offered_requests_per_s == pytest.approx(3 / 0.1)
    assert report.requests_per_s == pytest.approx(0.3)
    assert report.output_tokens_per_s == pytest.approx(3.0)
    assert report.busy_spread == pytest.approx(300 / 200)
    assert report.token_spread == pytest.approx(2.0)
    assert (report.migrated, report.preemptions) == (1, 3)
    assert report.prediction_error == pytest.approx(0.5)
    assert (report.itl.p50, report.itl.max, report.itl.count) == (10.0, 20.0, 27)


def test_floor_is_the_timing_model_alone() -> None:
    # The mocker's polynomial for 750 tokens, by hand.
    expected = 4.209989e-7 * 750**2 + 1.518344e-2 * 750 + 16.50142
    report = summarize(result([100.0, math.nan], cached=250))
    assert (report.floor_ttft.count, report.floor_ttft.mean) == (1, pytest.approx(expected))


def test_floor_goes_in_chunks_and_computes_one_token_at_least() -> None:
    timing = create("linear:prefill_ms_per_token=1")
    config = SimulationConfig(max_step_tokens=256)
    assert alone_ttft_ms(timing, config, 1000, 300) == pytest.approx(700)
    assert alone_ttft_ms(timing, config, 1000, 1000) == pytest.approx(1)
    polynomial = create("polynomial")
    whole = alone_ttft_ms(polynomial, SimulationConfig(), 8192, 0)
    assert alone_ttft_ms(polynomial, SimulationConfig(), 16384, 0) == pytest.approx(2 * whole)


def test_json_has_no_nan() -> None:
    text = json.dumps(as_json(summarize(result([math.nan]))), allow_nan=False)
    read = json.loads(text)
    assert read["ttft"] == {"count": 0} | dict.fromkeys(("mean", *PERCENTILES, "max"))
    assert read["config"]["policy"] == "kv"
    assert read["offered_requests_per_s"] is None


def test_tables_name_policies_speeds_and_figures() -> None:
    reports = [
        summarize(result([10.0, 2000.0], policy=policy, speed=speed))
        for policy in ("kv", "round_robin")
        for speed in (1.0, 2.5)
    ]
    console = Console(width=140)
    with console.capture() as capture:
        console.print(tables(reports))
    text = capture.get()
    for word in ("TTFT", "ITL", "end to end", "round_robin", "×2.5", "2,000", "1,005", "10.0"):
        assert word in text
