"""What the next step computes: a pure decision over numbers.

`schedule` takes a snapshot and returns a decision; it changes nothing, and knows
no blocks by number, no tokens, no clock.

Sequences stand in one order: higher priority first, then earlier arrival. It
decides who is served, who is admitted next, and (from its end) who gives way:

1. Every running sequence that decodes gets its token. Prefills share what is
   left of the step's tokens, in order, in chunks.
2. A decode that finds no block preempts the last running sequence, itself at
   worst. What was preempted waits, in its old place, and is recomputed; its full
   blocks stay cached as long as there is room.
3. Waiting sequences are admitted in order while there are slots, tokens and
   blocks for all that is known of them, and a block is left for each running
   sequence to grow into. None overtakes one that does not fit, and none is
   admitted in a step that preempts.

So the first of the order always advances, and nothing of one priority starves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Schedulable(Protocol):
    """What the scheduler reads of a sequence."""

    @property
    def sequence_id(self) -> int:
        """Its name in the decision."""

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and generated."""

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is in the cache; less than `num_tokens`."""

    @property
    def num_blocks(self) -> int:
        """Blocks that it holds; while it prefills, enough for all known tokens."""


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What the prefix cache holds of a waiting sequence."""

    #: Full blocks at its start that need no computing; at least one token is left.
    num_blocks: int = 0
    #: How many of them nobody uses now.
    num_unused: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a decision depends on. Nothing of it changes while `schedule` runs."""

    #: Both in order.
    running: Sequence[Schedulable]
    waiting: Iterable[Schedulable]
    num_available_blocks: int
    block_size: int
    max_step_tokens: int
    max_sequences: int
    #: Looked at only for a sequence that might be admitted.
    cached_prefix: Callable[[Schedulable], CachedPrefix]
    #: Blocks that no other sequence uses; looked at only to preempt.
    num_exclusive_blocks: Callable[[Schedulable], int]


class Chunk(NamedTuple):
    """Give a sequence `num_new_blocks`, then compute its next `num_tokens`.

    A waiting sequence is admitted by its first chunk, which stands after
    `num_cached_blocks` shared ones. (A tuple: there are many, and they are cheap.)
    """

    sequence_id: int
    num_tokens: int
    num_new_blocks: int = 0
    num_cached_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """To be applied in this order: preemptions, then admissions' shared blocks, then new ones."""

    preempted: list[int] = field(default_factory=list)
    decodes: list[Chunk] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    admissions: list[Chunk] = field(default_factory=list)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens`."""
    return -(-num_tokens // block_size)


def schedule(snapshot: Snapshot) -> Decision:
    """Decide the next step. Chunks and admissions fit its tokens, slots and blocks."""
    decision = Decision()
    running, available = _make_room(snapshot, decision)
    budget = snapshot.max_step_tokens - len(decision.decodes)
    for sequence in running:
        left = sequence.num_tokens - sequence.num_computed
        if left > 1 and budget > 0:
            decision.prefills.append(Chunk(sequence.sequence_id, min(left, budget)))
            budget -= min(left, budget)
    if not decision.preempted:
        _admit(snapshot, decision, budget, available)
    return decision


def _make_room(snapshot: Snapshot, decision: Decision) -> tuple[list[Schedulable], int]:
    """Give decodes their token and block, preempting from the order's end.

    Returns the sequences that go on running, and the blocks that are left.
    """
    running = list(snapshot.running)
    available = snapshot.num_available_blocks
    block_size = snapshot.block_size
    served = 0
    while served < len(running):
        sequence = running[served]
        num_tokens = sequence.num_tokens
        needed = -(-num_tokens // block_size) - sequence.num_blocks
        while needed > available and len(running) > served:
            victim = running.pop()
            available += snapshot.num_exclusive_blocks(victim)
            decision.preempted.append(victim.sequence_id)
        if len(running) == served:
            break
        available -= needed
        served += 1
        if num_tokens - sequence.num_computed == 1:
            decision.decodes.append(Chunk(sequence.sequence_id, 1, needed))
    return running, available


def _admit(snapshot: Snapshot, decision: Decision, budget: int, available: int) -> None:
    slots = snapshot.max_sequences - len(snapshot.running)
    growing = len(snapshot.running)
    for sequence in snapshot.waiting if slots > 0 and budget > 0 else ():
        cached = snapshot.cached_prefix(sequence)
        new_blocks = blocks_for(sequence.num_tokens, snapshot.block_size) - cached.num_blocks
        taken = new_blocks + cached.num_unused
        if growing and taken + growing > available:
            return
        left = sequence.num_tokens - cached.num_blocks * snapshot.block_size
        admission = Chunk(sequence.sequence_id, min(left, budget), new_blocks, cached.num_blocks)
        decision.admissions.append(admission)
        budget -= admission.num_tokens
        available -= taken
        growing += 1
        slots -= 1
        if not slots or not budget:
            return
