"""What the router has counted since its start: the one place that metrics are read from.

Plain numbers that only grow. What is true now (workers, blocks, lag) is not here:
the fleet knows it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """One router's counters."""

    #: Requests that were given a worker, and those that could not be.
    decisions: int = 0
    refused_decisions: int = 0
    #: Decisions for a prompt of one full block or more of which no worker that could
    #: be chosen held any: all of them, all the time, is what a hash mismatch looks like.
    zero_matches: int = 0
    #: Tokens of the prompts decided, and how many of them the chosen worker held.
    prompt_tokens: int = 0
    matched_tokens: int = 0
    #: Events taken into the index.
    events: int = 0
    #: Workers read anew, by the kind of cause: new, new generation, gap, trimmed.
    resyncs: Counter[str] = field(default_factory=Counter)
    #: Workers refused for disagreeing with their model, once for each generation.
    refusals: int = 0
    #: Workers found not to answer.
    outages: int = 0
    #: Requests that had to wait, all workers being saturated; of these, refused at once for
    #: a full queue or displaced in it; out of time before their turn; cancelled meanwhile.
    waits: int = 0
    queue_refusals: int = 0
    queue_deadlines: int = 0
    queue_cancels: int = 0
