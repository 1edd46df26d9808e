"""Replays in virtual time: every request ends once, whatever happens to workers and routers."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.blocks import block_ids
from headrace.errors import InvalidArgument, StartupError
from services.replay.simulation import (
    COMPLETED,
    FAILED,
    REFUSED,
    FleetEvent,
    SimulationConfig,
    SimulationResult,
    simulate,
)
from services.replay.simulation_content import NAMESPACE, Content
from services.replay.simulation_loop import Simulation
from services.replay.workload import Trace, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALL = SimulationConfig(
    num_workers=3, num_blocks=40, block_size=4, policy="round_robin", max_sequences=4,
    max_step_tokens=32, failure_detection_ms=50.0,
)  # fmt: skip


def trace_of(*requests: TraceRequest, block_size: int = 8) -> Trace:
    return Trace(tuple(sorted(requests, key=lambda r: r.arrival_ms)), block_size)


def steady_trace(num_requests: int, every_ms: float = 20.0, output_tokens: int = 30) -> Trace:
    """Conversations of growing prompts: request i has i % 4 + 1 pieces of family i // 4."""
    return trace_of(
        *(
            TraceRequest(
                i * every_ms, 8 * (i % 4 + 1) + 3, output_tokens,
                tuple(i // 4 * 10 + piece for piece in range(i % 4 + 1)), session_id=str(i // 4),
            )
            for i in range(num_requests)
        )
    )  # fmt: skip


def same(one: SimulationResult, other: SimulationResult) -> bool:
    """Whether all is equal, to the bit."""
    for field in fields(SimulationResult):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            if not np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f"):
                return False
        elif mine != theirs:
            return False
    return True


def check_conserved(trace: Trace, result: SimulationResult) -> None:
    """Every request ended once, with all its tokens if it completed, and each token has a gap."""
    done = result.status == COMPLETED
    wanted = np.array([r.output_tokens for r in trace.requests])
    assert np.array_equal(result.output_tokens[done], wanted[done])
    assert np.all(result.output_tokens <= wanted)
    assert np.all(result.worker[done] >= 0)
    assert np.all(result.ttft_ms[done] > 0)
    assert np.all(result.e2e_ms[done] >= result.ttft_ms[done])
    assert np.all(result.cached_tokens < result.prompt_tokens.clip(1))
    gaps = int(result.output_tokens.sum()) - int((result.output_tokens > 0).sum())
    assert int(result.gap_counts.sum()) == gaps
    assert sum(worker.requests for worker in result.workers) == int(done.sum())


def test_one_request_takes_what_its_steps_take() -> None:
    config = replace(SMALL, timing="linear:step_ms=10,prefill_ms_per_token=1", hop_ms=0.0)
    result = simulate(trace_of(TraceRequest(100.0, 20, 5)), config)
    # 20 prompt tokens, then 4 more tokens of 10 ms each.
    assert result.ttft_ms.tolist() == pytest.approx([20.0])
    assert result.e2e_ms.tolist() == pytest.approx([60.0])
    assert (result.gap_ms.tolist(), result.gap_counts.tolist()) == ([10.0], [4])
    assert result.duration_ms == pytest.approx(60.0)
    assert result.arrival_ms.tolist() == [100.0]
    far = simulate(trace_of(TraceRequest(100.0, 20, 5)), replace(config, hop_ms=3.0))
    # Gateway to router, router to worker, worker to gateway.
    assert far.ttft_ms.tolist() == pytest.approx([29.0])


def test_a_shared_prefix_is_computed_once_where_the_router_sends_it() -> None:
    first, second = (TraceRequest(at, 803, 2, tuple(range(100))) for at in (0.0, 50_000.0))
    # The steps that a router expects of a worker that it knows nothing of.
    timing = "linear:step_ms=10,prefill_ms_per_token=0.1"
    large = replace(SMALL, num_blocks=500, timing=timing)
    kv = simulate(trace_of(first, second), replace(large, policy="kv"))
    assert kv.worker[0] == kv.worker[1]
    assert kv.matched_tokens.tolist() == kv.cached_tokens.tolist() == [0, 800]
    assert kv.reuse_ratio == 800 / 1606
    apart = simulate(trace_of(first, second), large)
    assert apart.worker[0] != apart.worker[1]
    assert apart.reuse_ratio == 0


def test_what_does_not_fit_the_device_comes_back_from_the_host() -> None:
    """A slower tier keeps what the device can't; how fast it comes back is in the TTFT."""
    once = steady_trace(24, every_ms=400).requests
    again = [replace(request, arrival_ms=request.arrival_ms + 20_000) for request in once]
    twice = trace_of(*once, *again)
    small = replace(SMALL, policy="kv", num_workers=1, num_blocks=20)
    none = simulate(twice, small)
    host = simulate(twice, replace(small, host_blocks=400, host_gbps=10.0))
    slow = simulate(twice, replace(small, host_blocks=400, host_gbps=0.01))
    assert host.reuse_ratio > none.reuse_ratio
    assert slow.cached_tokens.sum() == host.cached_tokens.sum()
    assert np.nanmean(slow.ttft_ms) > np.nanmean(host.ttft_ms)
    # The router knew what bringing it takes.
    assert slow.predicted_ttft_ms[24:].mean() > host.predicted_ttft_ms[24:].mean()


@pytest.mark.parametrize("num_routers", [1, 3])
def test_equal_inputs_give_equal_results(num_routers: int) -> None:
    config = replace(
        SMALL, policy="kv", num_routers=num_routers, events=(FleetEvent(150.0, "fail", 1),)
    )
    trace = steady_trace(60)
    results = [simulate(trace, config) for _ in range(2)]
    assert same(*results)
    assert not same(results[0], simulate(trace, replace(config, speed=2.0)))


def test_a_dead_workers_requests_go_on_elsewhere() -> None:
    trace = steady_trace(30, every_ms=5.0)
    large = replace(SMALL, num_blocks=400)
    calm = simulate(trace, large)
    result = simulate(trace, replace(large, events=(FleetEvent(100.0, "fail", 1),)))
    check_conserved(trace, result)
    assert set(result.status.tolist()) == {COMPLETED}
    moved = result.migrations > 0
    assert moved.any()
    assert not (result.worker[moved] == 1).any()
    # Tokens that clients had stay theirs: those requests only wait longer.
    assert np.all(result.e2e_ms[moved] > 50)
    assert result.gap_ms.max() >= 50 > calm.gap_ms.max()


def test_a_draining_worker_finishes_and_a_joining_one_serves() -> None:
    events = (FleetEvent(100.0, "leave", 0), FleetEvent(100.0, "join", 3))
    trace = steady_trace(60)
    result = simulate(trace, replace(SMALL, events=events))
    check_conserved(trace, result)
    assert set(result.status.tolist()) == {COMPLETED}
    assert not result.migrations.any()
    late = result.arrival_ms > 110
    assert set(result.worker[late].tolist()) == {1, 2, 3}
    assert 0 in result.worker[~late]


def test_a_worker_that_fails_and_returns_is_empty() -> None:
    request = TraceRequest(0.0, 19, 2, (1, 2))
    trace = trace_of(request, replace(request, arrival_ms=5000.0))
    events = (FleetEvent(2000.0, "fail", 0), FleetEvent(3000.0, "join", 0))
    result = simulate(trace, replace(SMALL, num_workers=1, policy="kv", events=events))
    assert result.status.tolist() == [COMPLETED] * 2
    assert result.cached_tokens.tolist() == result.matched_tokens.tolist() == [0, 0]


def test_requests_wait_for_a_worker_to_come_or_fail() -> None:
    trace = trace_of(TraceRequest(10.0, 8, 2))
    gone = (FleetEvent(0.0, "fail", 0),)
    back = (*gone, FleetEvent(3000.0, "join", 0))
    alone = replace(SMALL, num_workers=1, failure_detection_ms=1.0)
    late = simulate(trace, replace(alone, events=back))
    assert late.status.tolist() == [COMPLETED]
    assert late.ttft_ms[0] > 2900
    never = simulate(trace, replace(alone, events=gone))
    assert never.status.tolist() == [FAILED]
    assert np.isnan(never.ttft_ms[0])
    assert never.errors == {"model 'replay' has no worker now": 1}
    assert never.duration_ms == 0


def test_more_than_the_routers_queue_holds_is_refused() -> None:
    trace = trace_of(*(TraceRequest(i / 100, 8, 50) for i in range(60)))
    result = simulate(trace, replace(SMALL, policy="kv", max_waiting_requests=5))
    check_conserved(trace, result)
    assert Counter(result.status.tolist()).keys() == {COMPLETED, REFUSED}
    whole = simulate(trace, SMALL)
    assert set(whole.status.tolist()) == {COMPLETED}
    direct = simulate(trace, replace(SMALL, router_queue=False))
    assert set(direct.status.tolist()) == {COMPLETED}


def test_a_prompt_that_no_worker_can_hold_fails_alone() -> None:
    trace = trace_of(TraceRequest(0.0, 200, 5), TraceRequest(1.0, 8, 5))
    result = simulate(trace, SMALL)
    assert result.status.tolist() == [FAILED, COMPLETED]
    (error,) = result.errors
    assert "KV cache's size of 160 tokens, not 200" in error


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    simulate(steady_trace(20), SMALL, lambda ended, total: told.append((ended, total)))
    assert told[-1] == (20, 20)
    assert told == sorted(told)


def test_an_empty_trace_is_over_at_once() -> None:
    result = simulate(Trace((), 8), SMALL)
    assert (result.duration_ms, result.reuse_ratio, result.output_tokens_per_s) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_workers", 0), ("num_blocks", 0), ("num_routers", 0), ("max_step_tokens", 3),
        ("hop_ms", -1.0), ("speed", 0.0), ("speed", float("nan")), ("kv_event_delay_ms", -0.1),
        ("host_blocks", -1), ("disk_gbps", 0.0),
    ],
)  # fmt: skip
def test_bad_counts_are_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=f"{name} must be"):
        replace(SMALL, **{name: value})  # type: ignore[arg-type]


def test_an_unknown_timing_is_refused() -> None:
    with pytest.raises(StartupError, match="'sundial' is unknown"):
        simulate(steady_trace(1), replace(SMALL, timing="sundial"))


def test_a_trace_out_of_order_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="request 2: arrival_ms must be at least 5"):
        Trace((TraceRequest(5.0, 1, 1), TraceRequest(4.0, 1, 1)))


EVENTS = st.lists(
    st.builds(
        FleetEvent,
        at_ms=st.floats(0, 400),
        kind=st.sampled_from(["fail", "leave", "join"]),
        worker=st.integers(0, 3),
    ),
    max_size=4,
)
REQUESTS = st.lists(
    st.builds(
        TraceRequest,
        arrival_ms=st.floats(0, 400),
        num_tokens=st.integers(1, 60),
        output_tokens=st.integers(1, 40),
        hash_ids=st.lists(st.integers(0, 2), max_size=6).map(tuple),
        tenant=st.sampled_from(["", "other"]),
        priority=st.integers(0, 1),
        timeout_ms=st.sampled_from([0, 0, 300]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=REQUESTS,
    events=EVENTS,
    num_routers=st.integers(1, 2),
    policy=st.sampled_from(["kv", "round_robin", "least_loaded"]),
)
def test_nothing_is_lost_whatever_happens(
    requests: Sequence[TraceRequest], events: Sequence[FleetEvent], num_routers: int, policy: str
) -> None:
    trace = trace_of(*requests)
    # A last worker comes for good.
    events = (*events, FleetEvent(1000.0, "join", 9))
    config = replace(SMALL, events=tuple(events), num_routers=num_routers, policy=policy)
    run = Simulation(trace, config)
    result = run.run()
    check_conserved(trace, result)
    in_time = np.array([r.timeout_ms == 0 for r in trace.requests])
    assert np.all(result.status[in_time] == COMPLETED)
    for worker in run.workers():
        if not worker.is_gone:
            worker.core.check()
            assert not worker.calls
            assert worker.core.stats().used_blocks == 0
    run.finish()
    for node in run.routers.nodes:
        assert not len(node.router.reservations)
        assert not len(node.router.waiting)
        for member in node.router.fleet.workers():
            owned = run.worker(int(member.key.worker_id[1:])).core.owned_blocks()
            assert node.router.fleet.owned(member)["device"] == set(owned)


@pytest.mark.parametrize(("piece_len", "block_size"), [(8, 4), (4, 8), (5, 3), (0, 4), (7, 7)])
def test_block_ids_are_those_of_the_tokens(piece_len: int, block_size: int) -> None:
    request = TraceRequest(0.0, 41, 30, (5, 6, 7, 5, 9))
    content = Content(request, 3, piece_len, block_size)
    whole = content.tokens(0, 71)
    assert len(whole) == 71 * 4
    assert whole == b"".join(content.tokens(i, i + 1) for i in range(71))
    expected = block_ids(whole, block_size, NAMESPACE)
    # Whether asked for at once or one by one.
    assert Content(request, 3, piece_len, block_size).block_ids(len(expected)) == expected
    found = [content.block_ids(n + 1)[-1] for n in range(len(expected))]
    assert found == expected


def test_prompts_share_blocks_as_far_as_their_pieces_are_equal() -> None:
    one = Content(TraceRequest(0.0, 40, 8, (1, 2, 3, 4, 5)), 0, 8, 4)
    two = Content(TraceRequest(0.0, 40, 8, (1, 2, 9, 4, 5)), 1, 8, 4)
    short = Content(TraceRequest(0.0, 14, 8, (1, 2)), 2, 8, 4)
    ids = [content.block_ids(n) for content, n in ((one, 12), (two, 12), (short, 5))]
    assert ids[0][:4] == ids[1][:4]
    assert not set(ids[0][4:]) & set(ids[1][4:])
    assert ids[2][:3] == ids[0][:3]
    # The last piece is cut short, then comes an answer of its own.
    assert ids[2][3:] != ids[0][3:5]
