"""The command line's values, and whether trace and fleet go together."""

from __future__ import annotations

import click
import pytest

from headrace.errors import StartupError
from services.replay import options
from services.replay.checks import check
from services.replay.options import At, fleet_events
from services.replay.simulation import FleetEvent, SimulationConfig
from services.replay.workload import Trace, TraceRequest

SHORT, LONG = TraceRequest(0, 100, 10, (1,)), TraceRequest(1, 5000, 10, (1,))


def test_lists() -> None:
    assert options.names(("kv", "session"))("kv, session") == ("kv", "session")
    assert options.speeds("1,2.5") == (1.0, 2.5)
    assert options.unique([("a", "b"), ("b", "c")]) == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x", "", "1,,2", "1e7"])
def test_speeds_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match="a speed must be above 0"):
        options.speeds(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "fast"])
def test_bandwidths_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match="bandwidth must be above 0"):
        options.gbps(text)
    assert options.gbps("12.5") == 12.5


def test_names_that_are_none() -> None:
    with pytest.raises(click.BadParameter, match="'kw' is none of kv, session"):
        options.names(("kv", "session"))("kv,kw")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("3", "must be WORKER@SECONDS"),
        ("x@3", "must be WORKER@SECONDS"),
        ("3@", "must be WORKER@SECONDS"),
        ("-1@3", "WORKER must be from 0"),
        ("100000@3", "WORKER must be from 0 to 99,999"),
        ("3@-1", "SECONDS must be from 0"),
        ("3@nan", "SECONDS must be from 0"),
    ],
)
def test_moments_that_are_none(text: str, named: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        options.number_at("WORKER", least=0)(text)
    assert named in str(caught.value)
    assert repr(text) in str(caught.value)


def _events(**given: list[At]) -> tuple[FleetEvent, ...]:
    none: list[At] = []
    return fleet_events(4, **({"fail": none, "leave": none, "restart": none, "join": none} | given))


def test_fleet_events_in_order_of_time() -> None:
    events = _events(
        fail=[At(3, 60), At(4, 130)], restart=[At(3, 90.5)], join=[At(2, 120)], leave=[At(0, 10)]
    )
    assert events == (
        FleetEvent(10_000, "leave", 0),
        FleetEvent(60_000, "fail", 3),
        FleetEvent(90_500, "join", 3),
        FleetEvent(120_000, "join", 4),
        FleetEvent(120_000, "join", 5),
        FleetEvent(130_000, "fail", 4),
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"fail": [At(4, 60)]}, "--fail 4@60: there is no worker 4 then"),
        ({"leave": [At(1, 9)], "fail": [At(1, 60)]}, "--fail 1@60: there is no worker 1 then"),
        ({"fail": [At(4, 60)], "join": [At(1, 61)]}, "--fail 4@60: there is no worker 4 then"),
        ({"restart": [At(1, 60)]}, "--restart 1@60: worker 1 has not failed"),
        ({"restart": [At(9, 60)]}, "--restart 9@60: worker 9 has not failed"),
        ({"join": [At(99_999, 1)]}, "--join 99999@1: more than 100,000 workers"),
    ],
)
def test_fleet_events_that_cannot_be(given: dict[str, list[At]], named: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        _events(**given)
    assert named in str(caught.value)


def test_session_policy_needs_session_ids() -> None:
    config = SimulationConfig(policy="session")
    with pytest.raises(StartupError, match="policy session needs session ids"):
        check(Trace((SHORT,), 512), [SimulationConfig(), config])
    named = TraceRequest(0, 100, 10, (1,), session_id="s")
    assert check(Trace((named,), 512), [config]) == []


def test_requests_that_do_not_fit() -> None:
    fleet = SimulationConfig(num_blocks=10, block_size=64)
    (warning,) = check(Trace((SHORT, LONG), 512), [fleet])
    assert "1 of 2 requests are longer than a worker's 640 tokens" in warning
    with pytest.raises(StartupError, match="no request fits a worker of 10 blocks of 64 tokens"):
        check(Trace((LONG,), 512), [fleet])


def test_a_trace_that_tells_nothing_of_prefixes() -> None:
    silent = Trace((TraceRequest(0, 100, 10),))
    (warning,) = check(silent, [SimulationConfig()])
    assert "kv can reuse nothing" in warning
    assert check(silent, [SimulationConfig(policy="round_robin")]) == []


def test_timing_models_are_checked_first() -> None:
    with pytest.raises(StartupError, match="sim timing 'abacus' is unknown"):
        check(Trace((SHORT,), 512), [SimulationConfig(timing="abacus")])
