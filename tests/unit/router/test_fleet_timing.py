"""What a fleet expects of its workers' steps: peers learn together, generations keep it."""

from __future__ import annotations

import pytest

from headrace.registry import ModelCard, WorkerCard
from services.router.fleet import Fleet, ReportedLoad, Worker
from services.router.latency_model import Totals

MODEL = ModelCard("m", "r", "d", context_len=65536, block_size=16)


def card(name: str, generation: int = 1, engine: str = "sim", blocks: int = 1000) -> WorkerCard:
    return WorkerCard(name, generation, "a:1", MODEL, engine, "", blocks, max_sequences=8)


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    fleet.set_model(MODEL)
    for name in ("a", "b"):
        fleet.join("m", card(name))
    fleet.join("m", card("other-size", blocks=500))
    fleet.join("m", card("other-engine", engine="torch"))
    return fleet


def worker(fleet: Fleet, name: str) -> Worker:
    found = fleet.worker("m", name)
    assert found is not None
    return found


def prefill(fleet: Fleet, name: str, ms_per_token: float, steps: int) -> None:
    """The worker reports prompts of 1,000 tokens computed one by one."""
    for number in range(1, steps + 1):
        count = 1000 * number
        totals = Totals(ms_per_token * count, number, count, 1000 * count)
        fleet.report("m", name, ReportedLoad(totals=totals))


def per_token(fleet: Fleet, name: str) -> float:
    return worker(fleet, name).latency.timing.prefill_ms(1000) / 1000


def test_what_one_measures_is_expected_of_those_alike(fleet: Fleet) -> None:
    told = []
    fleet.on_timing.append(told.append)
    before = per_token(fleet, "other-size")
    prefill(fleet, "a", 0.5, 64)
    assert per_token(fleet, "a") == pytest.approx(0.5, rel=0.05)
    assert per_token(fleet, "b") == pytest.approx(0.5, rel=0.05)
    assert worker(fleet, "b") in told
    assert not worker(fleet, "b").latency.timing.calibrated
    assert per_token(fleet, "other-size") == per_token(fleet, "other-engine") == before


def test_one_that_joins_later_expects_it_too(fleet: Fleet) -> None:
    prefill(fleet, "a", 0.5, 64)
    fleet.join("m", card("c"))
    assert per_token(fleet, "c") == pytest.approx(0.5, rel=0.05)
    fleet.leave("m", "c")
    prefill(fleet, "a", 0.5, 1)


def test_one_that_is_slower_than_its_peers_is_found_out(fleet: Fleet) -> None:
    prefill(fleet, "a", 0.5, 200)
    prefill(fleet, "b", 1.0, 400)
    assert per_token(fleet, "b") == pytest.approx(1.0, rel=0.1)


def test_a_new_generation_keeps_what_the_old_one_measured(fleet: Fleet) -> None:
    prefill(fleet, "a", 0.5, 64)
    prefill(fleet, "b", 1.0, 400)
    slow = worker(fleet, "b").latency.timing
    fleet.join("m", card("b", generation=2))
    assert worker(fleet, "b").latency.timing == slow
