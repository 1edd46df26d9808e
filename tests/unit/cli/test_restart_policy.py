"""What happens when a process dies: decisions alone."""

from __future__ import annotations

import signal

import pytest

from headrace.service import EXIT_CONFIG
from headrace.supervisor.policy import (
    ROLES,
    START_ORDER,
    STOP_ORDER,
    GiveUp,
    History,
    Restart,
    RestartPolicy,
    describe_exit,
    on_death,
)

POLICY = RestartPolicy(first_delay_s=0.1, max_delay_s=10.0, healthy_s=30.0, max_start_deaths=3)


def delays(history: History, times: list[float]) -> list[float]:
    """The delays after deaths at `times` in a mesh that has been ready."""
    found = []
    for now in times:
        history, verdict = on_death(history, 1, now, mesh_was_ready=True, policy=POLICY)
        assert isinstance(verdict, Restart)
        found.append(verdict.delay_s)
    return found


def test_delays_double_up_to_the_limit_for_ever() -> None:
    found = delays(History(), [float(n) for n in range(5000)])
    assert found[:8] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0])
    assert set(found[8:]) == {10.0}


def test_health_for_a_while_forgets_deaths() -> None:
    history = History(deaths_in_a_row=6, restarts=6).ready(100.0)
    _, verdict = on_death(history, -9, 130.0, mesh_was_ready=True, policy=POLICY)
    assert verdict == Restart(0.1)


def test_health_for_a_moment_forgets_nothing() -> None:
    history = History(deaths_in_a_row=2, restarts=2).ready(100.0)
    after, verdict = on_death(history, -9, 129.9, mesh_was_ready=True, policy=POLICY)
    assert verdict == Restart(pytest.approx(0.4))
    assert (after.deaths_in_a_row, after.restarts, after.ready_since) == (3, 3, None)


def test_bad_configuration_ends_a_start_at_once() -> None:
    _, verdict = on_death(History(), EXIT_CONFIG, 1.0, mesh_was_ready=False, policy=POLICY)
    assert verdict == GiveUp()


def test_bad_configuration_of_a_running_mesh_is_tried_again() -> None:
    _, verdict = on_death(History(), EXIT_CONFIG, 1.0, mesh_was_ready=True, policy=POLICY)
    assert verdict == Restart(0.1)


def test_repeated_deaths_end_a_start() -> None:
    history, verdicts = History(), []
    for now in range(3):
        history, verdict = on_death(history, -11, now, mesh_was_ready=False, policy=POLICY)
        verdicts.append(verdict)
    assert verdicts == [Restart(0.1), Restart(0.2), GiveUp()]


def test_every_role_starts_and_stops_once() -> None:
    started = [role for group in START_ORDER for role in group]
    stopped = [role for role, _ in STOP_ORDER]
    assert sorted(started) == sorted(stopped) == sorted(ROLES)


def test_stop_order_drains_the_edge_first_and_redis_last() -> None:
    assert [role for role, _ in STOP_ORDER] == [
        "gateway",
        "worker",
        "router",
        "tokenizer",
        "valkey",
    ]


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit status 0"), (2, "exit status 2"), (-signal.SIGKILL, "SIGKILL"), (-77, "signal 77")],
)
def test_exits_are_named(status: int, words: str) -> None:
    assert describe_exit(status) == words
