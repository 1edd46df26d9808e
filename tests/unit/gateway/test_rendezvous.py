"""Families are dealt evenly, and only those of a lost router move."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

from services.gateway.peers.rendezvous import in_order


@dataclass(frozen=True)
class Router:
    name: str
    seed: int


RANDOM = Random(0)
ROUTERS = [Router(name, RANDOM.getrandbits(64)) for name in "abcd"]
FAMILIES = [RANDOM.getrandbits(64) for _ in range(4000)]


def test_the_order_is_everybodys_and_even() -> None:
    orders = [in_order(family, ROUTERS) for family in FAMILIES]
    assert orders == [in_order(family, ROUTERS[::-1]) for family in FAMILIES]
    for place in range(4):
        shares = Counter(order[place].name for order in orders)
        assert all(850 < share < 1150 for share in shares.values())


def test_a_lost_routers_families_go_to_all_others_and_no_other_moves() -> None:
    lost, *left = ROUTERS
    moved: Counter[str] = Counter()
    for family in FAMILIES:
        first, second, *_ = in_order(family, ROUTERS)
        now = in_order(family, left)[0]
        assert now == (second if first == lost else first)
        moved[now.name] += first == lost
    assert all(220 < share < 450 for share in moved.values())
