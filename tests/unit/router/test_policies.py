"""What tells the policies apart."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from services.router.latency_model import Timing
from services.router.policies import Candidate, Load, RoutingRequest, load_policy


def chosen(policy: str, candidates: list[Candidate], num_tokens: int = 600, turn: int = 0) -> str:
    choice = load_policy(policy).choose(RoutingRequest(num_tokens, turn=turn), candidates)
    assert choice is not None
    return choice.candidate.worker_id


def test_kv_goes_where_the_prefix_is() -> None:
    candidates = [Candidate("a"), Candidate("b", matched_tokens=576), Candidate("c", 64)]
    assert {chosen("kv", candidates, turn=turn) for turn in range(6)} == {"b"}


def test_kv_stays_with_a_short_prefix_too() -> None:
    candidates = [Candidate("a"), Candidate("b", matched_tokens=16)]
    assert {chosen("kv", candidates, num_tokens=20, turn=turn) for turn in range(6)} == {"b"}


def test_kv_leaves_the_owner_once_its_queue_costs_more_than_the_prefix_saves() -> None:
    def with_queue(tokens: int) -> str:
        owner = Candidate("owner", 576, Load(prefill_tokens=tokens, sequences=1))
        return chosen("kv", [owner, Candidate("idle")])

    assert with_queue(300) == "owner"
    assert with_queue(1000) == "idle"


def test_kv_does_not_pile_long_answers_onto_the_owner() -> None:
    owner = Candidate("owner", 576, Load(sequences=128))
    assert chosen("kv", [owner, Candidate("idle")]) == "idle"


def test_kv_prefers_the_faster_of_two_idle_workers() -> None:
    slow = Candidate("slow", timing=Timing(prefill_ms_per_token=1.0))
    assert {chosen("kv", [slow, Candidate("fast")], turn=turn) for turn in (0, 1)} == {"fast"}


def test_kv_takes_workers_that_differ_by_less_than_the_estimate_in_turn() -> None:
    nearly = Candidate("b", timing=Timing(prefill_ms_per_token=0.101))
    candidates = [Candidate("a"), nearly]
    assert {chosen("kv", candidates, turn=turn) for turn in (0, 1)} == {"a", "b"}


def test_least_loaded_counts_sequences() -> None:
    candidates = [
        Candidate("owner", 576, Load(sequences=3)),
        Candidate("long", 0, Load(prefill_tokens=9000, sequences=1)),
        Candidate("short", 0, Load(prefill_tokens=100, sequences=1)),
    ]
    assert chosen("least_loaded", candidates) == "short"


def test_round_robin_looks_at_nothing() -> None:
    candidates = [Candidate("a", 576), Candidate("b", 0, Load(90_000, 900))]
    assert [chosen("round_robin", candidates, turn=turn) for turn in range(4)] == list("abab")


#: An 8-billion-parameter model on a large GPU, about.
CALIBRATED = Timing(
    prefill_step_ms=16.0,
    prefill_ms_per_token=0.016,
    prefill_ms_per_square=3e-7,
    prefill_ms_per_context=0.0,
    decode_step_ms=6.0,
    decode_ms_per_sequence=0.1,
    decode_ms_per_context=2e-5,
    step_tokens=8192,
    calibrated=True,
)


class Fleet:
    """Workers of which all is known at once: loads grow, prefixes come, nothing ends."""

    def __init__(self, num_workers: int, held: dict[int, int] | None = None) -> None:
        self.names = [f"w{i}" for i in range(num_workers)]
        self.held = {f"w{i}": tokens for i, tokens in (held or {}).items()}
        self.coming: dict[str, int] = {}
        self.queued = dict.fromkeys(self.names, 0)
        self.sequences = dict.fromkeys(self.names, 0)

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(
                name,
                self.held.get(name, 0),
                Load(self.queued[name], self.sequences[name], 0, 16_384, 256, 64),
                CALIBRATED,
                coming_tokens=self.coming.get(name, 0),
            )
            for name in self.names
        ]

    def send(self, policy: str, num_tokens: int, prefix: int, turn: int) -> str:
        request = RoutingRequest(num_tokens=num_tokens, max_tokens=100, turn=turn)
        choice = load_policy(policy).choose(request, self.candidates())
        assert choice is not None
        name = choice.candidate.worker_id
        cached = max(self.held.get(name, 0), self.coming.get(name, 0))
        self.queued[name] += num_tokens - cached
        self.sequences[name] += 1
        self.coming[name] = max(self.coming.get(name, 0), prefix)
        return name


def test_a_cold_burst_of_siblings_neither_scatters_nor_piles_up() -> None:
    fleet = Fleet(8)
    workers = Counter(fleet.send("kv", 8192 + 300, 8192, turn) for turn in range(24))
    assert 2 <= len(workers) <= 6
    assert max(workers.values()) <= 16


def test_a_hot_prefix_replicates() -> None:
    fleet = Fleet(4, held={0: 4096})
    workers = [fleet.send("kv", 4096 + 1000, 4096, turn) for turn in range(40)]
    assert workers[0] == "w0"
    assert set(workers) == set(fleet.names)


def test_an_idle_worker_is_not_starved_by_stickiness() -> None:
    fleet = Fleet(2, held={0: 2048})
    assert "w1" in [fleet.send("kv", 2300, 2048, turn) for turn in range(64)]


@pytest.mark.parametrize("seed", range(3))
def test_kv_spreads_unrelated_prompts_as_least_loaded_does_or_better(seed: int) -> None:
    """By the longest queue that they leave."""
    lengths = [int(random.Random(f"{seed} {i}").lognormvariate(7, 1)) + 1 for i in range(200)]
    longest = {}
    for policy in ("kv", "least_loaded"):
        fleet = Fleet(8)
        for turn, length in enumerate(lengths):
            fleet.send(policy, length, 0, turn)
        longest[policy] = max(fleet.queued.values())
    assert longest["kv"] <= longest["least_loaded"] * 1.02


def test_the_best_worker_is_waited_for_when_its_memory_is_full() -> None:
    full = Load(0, 60, 16_300, 16_384, 256, 64)
    owner = Candidate("owner", 16_384, full, CALIBRATED)
    stranger = Candidate("stranger", 0, Load(30_000, 60, 8000, 16_384, 256, 64), CALIBRATED)
    choice = load_policy("kv").choose(RoutingRequest(num_tokens=32_000), [owner, stranger])
    assert choice is not None
    assert (choice.candidate, choice.has_room) == (owner, False)
    fits = load_policy("kv").choose(RoutingRequest(num_tokens=16_500), [owner, stranger])
    assert fits is not None
    assert (fits.candidate, fits.has_room) == (owner, True)


def test_an_idle_worker_has_room_for_whatever_comes() -> None:
    idle = Candidate("idle", load=Load(0, 0, 0, 100, 1, 64))
    choice = load_policy("kv").choose(RoutingRequest(num_tokens=100_000), [idle])
    assert choice is not None
    assert choice.has_room


@pytest.mark.parametrize(
    "objective", [{"slo_ttft_ms": 400.0}, {"timeout_ms": 4000}, {"slo_itl_ms": 14.0}]
)
def test_a_worker_that_meets_the_objective_is_preferred(objective: dict[str, Any]) -> None:
    owner = Candidate("owner", 60_000, Load(20_000, 80, 9000, 16_384, 256, 64), CALIBRATED)
    quick = Candidate("quick", 60_000 - 8000, Load(), CALIBRATED)
    request = RoutingRequest(num_tokens=60_100, max_tokens=340)
    slow = Candidate("slow", 60_000, Load(0, 12, 6000, 16_384, 256, 64), CALIBRATED)
    for other in (owner, slow):
        met = load_policy("kv").choose(replace(request, **objective), [other, quick])
        assert met is not None
        assert met.candidate is quick or met.predicted_ttft_ms < 400


def test_slower_tiers_count_as_cached_and_cost_their_transfer() -> None:
    held = Candidate("held", 0, Load(), CALIBRATED, slower_tokens=8192, transfer_ms=20.0)
    assert chosen("kv", [held, Candidate("bare", timing=CALIBRATED)], num_tokens=8500) == "held"
    dear = held._replace(transfer_ms=2000.0)
    assert chosen("kv", [dear, Candidate("bare", timing=CALIBRATED)], num_tokens=8500) == "bare"


def test_among_very_many_workers_the_owner_and_the_idle_are_seen() -> None:
    busy = [Candidate(f"w{i:04}", load=Load(5000, 9), timing=CALIBRATED) for i in range(1000)]
    owner = Candidate("x", 4096, Load(100, 20), CALIBRATED)
    assert chosen("kv", [*busy, owner], num_tokens=4200) == "x"
    assert chosen("kv", [*busy, Candidate("y", timing=CALIBRATED)], num_tokens=4200) == "y"


def test_prefix_and_session_stay_until_their_worker_has_more_than_its_share() -> None:
    candidates = [Candidate(f"w{i}", load=Load(0, 4)) for i in range(4)]
    for policy, request in (
        ("prefix_hash", RoutingRequest(num_tokens=500, prefix_hash=12345)),
        ("session", RoutingRequest(num_tokens=500, session_id="s")),
    ):
        found = set()
        for turn in range(8):
            choice = load_policy(policy).choose(replace(request, turn=turn), candidates)
            assert choice is not None
            found.add(choice.candidate.worker_id)
        assert len(found) == 1
        hot = [c._replace(load=Load(0, 40)) if c.worker_id in found else c for c in candidates]
        choice = load_policy(policy).choose(request, hot)
        assert choice is not None
        assert choice.candidate.worker_id not in found


def test_power_of_two_takes_the_less_loaded_and_never_the_busiest() -> None:
    candidates = [Candidate(f"w{i}", load=Load(0, i)) for i in range(8)]
    found = Counter(chosen("power_of_two", candidates, turn=turn) for turn in range(400))
    assert "w7" not in found
    assert found["w0"] > found["w6"]
