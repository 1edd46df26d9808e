"""What is computed from samples, and which prompts and moments are made."""

from __future__ import annotations

from array import array
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench import plot, traces
from headrace.bench.sample import Sample
from headrace.bench.stats import PERCENTILES, distribution, summarize
from headrace.bench.workload import FromTrace, Synthetic, arrivals, read_prompts
from headrace.errors import StartupError

ROOT = Path(__file__).resolve().parents[3]
finite = st.floats(0, 1e6, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=200))
def test_percentiles_are_numpys(values: list[float]) -> None:
    found = distribution(values)
    expected = np.percentile(values, PERCENTILES)
    assert np.allclose((found.p50, found.p90, found.p95, found.p99), expected)
    assert np.allclose((found.mean, found.max), (np.mean(values), max(values)))


def sample(meant_at: float, sent_at: float, *deltas: float, tokens: int, error: str = "") -> Sample:
    return Sample(
        meant_at,
        sent_at,
        deltas[-1] if deltas else sent_at,
        array("d", deltas),
        10,
        tokens,
        5,
        error,
    )


def test_times_run_from_when_a_request_was_meant_to_start() -> None:
    late = sample(1.0, 3.0, 4.0, 4.5, 5.0, tokens=5)
    failed = sample(0.0, 0.0, tokens=0, error="HTTP 503")
    summary = summarize([late, failed], mode="open", load=2.0, duration_s=5.0, cpu_s=1.0)
    assert (summary.ttft_s.p50, summary.latency_s.p50, summary.lateness_s.max) == (3.0, 4.0, 2.0)
    assert (summary.itl_s.count, summary.itl_s.mean) == (2, 0.5)
    assert summary.tpot_s.mean == 0.25
    assert (summary.requests, summary.succeeded, summary.errors) == (2, 1, {"HTTP 503": 1})
    assert (summary.output_tokens_per_s, summary.requests_per_s, summary.client_cpu) == (
        1,
        0.2,
        0.2,
    )


def test_arrivals_are_what_they_are_called() -> None:
    constant = list(islice(arrivals(4, "constant", 1), 9))
    assert constant == [number / 4 for number in range(9)]
    moments = np.array(list(islice(arrivals(4, "poisson", 1), 4001)))
    gaps = np.diff(moments)
    assert moments[0] == 0
    assert abs(gaps.mean() - 0.25) < 0.02
    # An exponential's standard deviation is its mean.
    assert abs(gaps.std() / gaps.mean() - 1) < 0.08
    assert list(islice(arrivals(4, "poisson", 1), 9)) == list(moments[:9])


def test_synthetic_prompts_share_what_they_are_told_to() -> None:
    made = Synthetic(20, 7, shared_prefix_len=50, num_groups=3, seed=4)
    prompts = list(islice(made.stream(), 60))
    assert [p.text for p in islice(made.stream(), 60)] == [p.text for p in prompts]
    assert {len(p.text.split()) for p in prompts} == {70}
    assert len({tuple(p.text.split()[:50]) for p in prompts}) == 3
    assert len({p.text for p in prompts}) == 60
    assert {p.max_tokens for p in prompts} == {7}


def test_a_mooncake_trace_keeps_moments_lengths_and_what_is_shared() -> None:
    recorded = traces.read(ROOT / "tests" / "data" / "mooncake_500.jsonl", 3)
    assert [(r.input_len, r.output_len) for r in recorded] == [
        (6758, 500),
        (7322, 490),
        (7236, 794),
    ]
    first, second, _ = islice(FromTrace(recorded).stream(), 3)
    assert len(first.text.split()) == 6758
    words = (first.text.split(), second.text.split())
    assert words[0][:512] == words[1][:512], "hash id 0 is common"
    assert words[0][512:1024] != words[1][512:1024]


def test_an_azure_trace(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1805900,396,109\n"
    )
    recorded = traces.read(path, None)
    assert [r.at_s for r in recorded] == [0.0, 0.5]
    first, second = islice(FromTrace(recorded).stream(), 2)
    assert (len(first.text.split()), first.max_tokens) == (374, 44)
    assert first.text.split()[:10] != second.text.split()[:10]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("t.jsonl", '{"timestamp": 1}\n', "record 1"),
        ("t.jsonl", "nonsense\n", "record 1"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,1\n", "record 1"),
        ("t.csv", "", "no request"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, content: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(StartupError, match=text):
        traces.read(path, None)


def test_prompts_from_files(tmp_path: Path) -> None:
    plain, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("one\n\ntwo\n")
    assert [p.text for p in islice(read_prompts(plain, 5).stream(), 3)] == ["one", "two", "one"]
    objects.write_text('{"prompt": "one", "max_tokens": 3}\n{"prompt": "two"}\n')
    assert [p.max_tokens for p in islice(read_prompts(objects, 5).stream(), 2)] == [3, 5]
    objects.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(StartupError, match=r"p\.jsonl:2"):
        read_prompts(objects, 5)


def test_both_pictures_are_drawn(tmp_path: Path) -> None:
    samples = [sample(0.0, 0.0, 0.1 + i / 50, 0.2 + i / 40, tokens=2) for i in range(20)]
    summaries = [
        summarize(samples, mode="closed", load=load, duration_s=1.0, cpu_s=0.1) for load in (1, 8)
    ]
    for count in (1, 2):
        path = tmp_path / f"{count}.png"
        plot.draw(path, "title", summaries[:count], [samples] * count)
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StartupError, match="--plot"):
        plot.draw(tmp_path / "x.unknown", "title", summaries, [samples] * 2)
