"""Routing policies: one file each behind one table, and a contract suite over the table."""

from __future__ import annotations

from importlib import import_module

from services.router.policies.base import Candidate, Choice, Load, Policy, RoutingRequest

__all__ = ["POLICIES", "Candidate", "Choice", "Load", "Policy", "RoutingRequest", "load_policy"]

POLICIES = {
    "kv": "services.router.policies.kv:Kv",
    "round_robin": "services.router.policies.round_robin:RoundRobin",
    "least_loaded": "services.router.policies.least_loaded:LeastLoaded",
    "power_of_two": "services.router.policies.power_of_two:PowerOfTwo",
    "prefix_hash": "services.router.policies.prefix_hash:PrefixHash",
    "session": "services.router.policies.session:Session",
}


def load_policy(name: str) -> Policy:
    """The policy that stands under `name` in the table. Raises KeyError."""
    module, _, attribute = POLICIES[name].partition(":")
    policy: Policy = getattr(import_module(module), attribute)()
    return policy
