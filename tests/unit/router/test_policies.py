"""What tells the policies apart."""

from __future__ import annotations

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
    assert with_queue(700) == "idle"


def test_kv_does_not_pile_long_answers_onto_the_owner() -> None:
    owner = Candidate("owner", 576, Load(sequences=64))
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
