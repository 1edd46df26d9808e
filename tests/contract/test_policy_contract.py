"""What every routing policy owes, whatever it prefers."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.latency_model import Timing
from services.router.policies import POLICIES, Candidate, Load, Policy, RoutingRequest, load_policy

TIMINGS = st.builds(
    Timing,
    prefill_step_ms=st.floats(0, 50),
    prefill_ms_per_token=st.floats(1e-4, 10),
    prefill_ms_per_square=st.floats(0, 1e-4),
    prefill_ms_per_context=st.floats(0, 1e-4),
    decode_step_ms=st.floats(0.1, 500),
    decode_ms_per_sequence=st.floats(0, 5),
    decode_ms_per_context=st.floats(0, 1e-3),
    step_tokens=st.sampled_from([0, 512, 8192]),
    calibrated=st.booleans(),
)
LOADS = st.builds(
    Load,
    prefill_tokens=st.integers(0, 100_000),
    sequences=st.integers(0, 500),
    used_blocks=st.integers(0, 20_000),
    total_blocks=st.sampled_from([0, 1000, 16_384]),
    max_sequences=st.sampled_from([0, 256]),
    block_size=st.sampled_from([0, 16]),
)
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        worker_id=st.uuids().map(str),
        matched_tokens=st.integers(0, 31).map(lambda n: n * 16),
        load=LOADS,
        timing=TIMINGS,
        slower_tokens=st.sampled_from([0, 160]),
        transfer_ms=st.floats(0, 1000),
        coming_tokens=st.integers(0, 62).map(lambda n: n * 16),
    ),
    max_size=12,
)
REQUESTS = st.builds(
    RoutingRequest,
    num_tokens=st.integers(1000, 4000),
    max_tokens=st.integers(0, 4000),
    num_sequences=st.integers(1, 16),
    priority=st.integers(-10, 10),
    timeout_ms=st.integers(0, 60_000),
    slo_ttft_ms=st.sampled_from([0.0, 500.0]),
    slo_itl_ms=st.sampled_from([0.0, 20.0]),
    session_id=st.sampled_from(["", "a", "\ud800"]),
    prefix_hash=st.sampled_from([0, 1, 2**64 - 1]),
    turn=st.integers(0, 1000),
)


@pytest.fixture(params=POLICIES, scope="module")
def policy(request: pytest.FixtureRequest) -> Policy:
    return load_policy(request.param)


def test_its_name_is_the_tables(policy: Policy) -> None:
    assert POLICIES[policy.name]


@settings(max_examples=60, deadline=None)
@given(request=REQUESTS, candidates=CANDIDATES, data=st.data())
def test_it_chooses_an_eligible_worker_or_none(
    policy: Policy, request: RoutingRequest, candidates: list[Candidate], data: st.DataObject
) -> None:
    ids = [c.worker_id for c in candidates]
    excluded = data.draw(st.sets(st.sampled_from(ids))) if ids else set()
    request = replace(request, exclude_workers=frozenset(excluded | {"another"}))
    choice = policy.choose(request, candidates)
    if len(excluded) == len(ids):
        assert choice is None
        return
    assert choice is not None
    assert choice.candidate in candidates
    assert choice.candidate.worker_id not in excluded
    assert choice.predicted_ttft_ms == choice.candidate.predicted_ttft_ms(request.num_tokens)
    assert choice.predicted_ttft_ms > 0


@settings(max_examples=30, deadline=None)
@given(request=REQUESTS, candidates=CANDIDATES)
def test_equal_arguments_give_an_equal_choice(
    policy: Policy, request: RoutingRequest, candidates: list[Candidate]
) -> None:
    first = policy.choose(request, candidates)
    policy.choose(replace(request, turn=request.turn + 1), candidates)
    assert policy.choose(request, candidates) == first
    assert load_policy(policy.name).choose(request, list(candidates)) == first


def test_the_only_worker_is_chosen(policy: Policy) -> None:
    busy = Candidate("busy", 0, Load(1_000_000, 10_000))
    choice = policy.choose(RoutingRequest(num_tokens=10), [busy])
    assert choice is not None
    assert choice.candidate is busy


def test_equal_workers_take_turns(policy: Policy) -> None:
    """Those that hash a prefix or a session get neither here."""
    candidates = [Candidate(f"w{i}") for i in range(4)]
    chosen = [
        policy.choose(RoutingRequest(num_tokens=500, turn=turn), candidates) for turn in range(8)
    ]
    workers = [choice.candidate.worker_id for choice in chosen if choice is not None]
    assert sorted(workers) == sorted(2 * [c.worker_id for c in candidates])


def test_nobody_to_choose(policy: Policy) -> None:
    assert policy.choose(RoutingRequest(num_tokens=10), []) is None
    refused = RoutingRequest(num_tokens=10, exclude_workers=frozenset({"a", "b"}))
    assert policy.choose(refused, [Candidate("a"), Candidate("b")]) is None


@settings(max_examples=60, deadline=None)
@given(request=REQUESTS, candidates=CANDIDATES)
def test_explains_each_candidate_by_parts(
    policy: Policy, request: RoutingRequest, candidates: list[Candidate]
) -> None:
    explained = policy.explain(request, candidates)
    assert len(explained) == len(candidates)
    for parts, candidate in zip(explained, candidates, strict=True):
        assert all(isfinite(value) and value >= 0 for value in parts.values())
        ttft_ms = sum(parts[name] for name in ("queue", "transfer", "prefill", "step"))
        assert ttft_ms == pytest.approx(candidate.predicted_ttft_ms(request.num_tokens))
