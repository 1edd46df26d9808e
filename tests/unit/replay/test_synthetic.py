"""Made-up traffic is what its description says."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import StartupError
from services.replay.traces import TraceOptions, load
from services.replay.traces.synthetic import parse
from services.replay.workload import Trace


def _trace(description: str, block_size: int = 0) -> Trace:
    return load(f"synthetic:{description}", TraceOptions(trace_block_size=block_size))


def test_equal_descriptions_give_equal_traces() -> None:
    one = _trace("requests=200,turns=3,prefixes=5")
    assert one == _trace("requests=200,turns=3,prefixes=5")
    assert one != _trace("requests=200,turns=3,prefixes=5,seed=1")


def test_rate_and_lengths() -> None:
    trace = _trace("requests=4000,rate=20,prompt=500,output=80")
    requests = trace.requests
    assert requests[-1].arrival_ms / 1000 == pytest.approx(4000 / 20, rel=0.1)
    assert fmean(r.num_tokens for r in requests) == pytest.approx(500, rel=0.05)
    assert fmean(r.output_tokens for r in requests) == pytest.approx(80, rel=0.05)
    equal = _trace("requests=50,prompt=500,output=80,spread=0").requests
    assert {(r.num_tokens, r.output_tokens) for r in equal} == {(500, 80)}


def test_the_default_shares_nothing() -> None:
    ids = [hash_id for request in _trace("").requests for hash_id in request.hash_ids]
    assert len(ids) == len(set(ids)) > 0


def test_rate_counts_turns_too() -> None:
    requests = _trace("requests=4000,rate=20,turns=4,think=1,output=10").requests
    assert requests[-1].arrival_ms / 1000 == pytest.approx(4000 / 20, rel=0.1)
    turns = Counter(request.session_id for request in requests)
    assert fmean(turns.values()) == pytest.approx(4, rel=0.1)


def test_prefixes_are_shared_and_the_first_most() -> None:
    trace = _trace("requests=2000,prefixes=10,prefix=640,prompt=100,zipf=1.2")
    first = Counter(request.hash_ids[0] for request in trace.requests)
    assert len(first) == 10
    assert first.most_common(1)[0][1] > 2 * 2000 / 10
    by_first: dict[int, tuple[int, ...]] = {}
    for request in trace.requests:
        shared = request.hash_ids[: 640 // 64]
        assert by_first.setdefault(shared[0], shared) == shared


@settings(max_examples=25)
@given(
    turns=st.integers(1, 6),
    prefixes=st.integers(0, 4),
    prefix=st.integers(1, 300),
    block_size=st.integers(1, 100),
    seed=st.integers(0, 1000),
)
def test_turns_go_on_from_their_turns(
    turns: int, prefixes: int, prefix: int, block_size: int, seed: int
) -> None:
    trace = _trace(
        f"requests=60,turns={turns},prefixes={prefixes},prefix={prefix},prompt=50,output=9,seed={seed}",
        block_size,
    )
    assert len(trace.requests) == 60
    before: dict[str, tuple[int, ...]] = {}
    owner: dict[int, str] = {}
    for request in trace.requests:
        ids = request.hash_ids
        assert len(ids) == request.num_tokens // block_size
        assert len(set(ids)) == len(ids)
        last = before.get(request.session_id, ())
        assert ids[: len(last)] == last
        before[request.session_id] = ids
        own = ids[prefix // block_size if prefixes else 0 :]
        assert {owner.setdefault(i, request.session_id) for i in own} <= {request.session_id}


@pytest.mark.parametrize(
    ("description", "named"),
    [
        ("request=5", "no such key: 'request'; known: requests, rate"),
        ("requests=0", "requests must be from 1 to 2,000,000, not 0"),
        ("requests=many", "requests must be an integer, not 'many'"),
        ("requests", "requests must be an integer, not ''"),
        ("rate=nan", "rate must be from 1e-06"),
        ("rate=0", "rate must be from 1e-06"),
        ("turns=0.5", "turns must be from 1 to 1,000, not 0.5"),
        ("rate=1,rate=2", "rate is given twice"),
        ("requests=2000000,prompt=100000", "blocks of prompts, limit 50,000,000"),
    ],
)
def test_descriptions_that_are_wrong(description: str, named: str) -> None:
    with pytest.raises(StartupError, match=r"^synthetic:") as caught:
        parse(f"synthetic:{description}")
    assert named in str(caught.value)
