"""What the next step computes: a pure decision over numbers.

`schedule` takes a snapshot and returns a decision; it changes nothing, and knows
no blocks by number, no tokens, no clock.

Running sequences stand in one order (higher priority first, then the one due
earlier): it decides who is served first and, from its end, who gives way.
Waiting ones come in the order of the waiting queue, which is fair to tenants.

1. Every running sequence that decodes gets its token. Prefills share what is
   left of the step's tokens, in order, in chunks.
2. One that finds no block for its next tokens preempts the last running
   sequence, itself at worst. (A prefill first makes do with fewer tokens.) What
   was preempted waits and is recomputed; its full blocks stay cached as long as
   there is room.
3. Waiting sequences are admitted in order while there are slots, tokens, and
   blocks for all that is known of them, beside what running prefills still need
   and a block for each running sequence to grow into. None overtakes one that
   does not fit, and none is admitted in a step that preempts. One whose next
   block another sequence is computing right now is passed over: soon it can
   share it.

So the first of the order always advances.

Block counts here are of *table* blocks, one of which is a physical block in each
of the KV groups (services/worker/kv/layout.py). A windowed group never needs
more physical blocks of a sequence than `Groups` says.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from headrace.blocks import BlockId


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
        """Tokens whose KV is in the cache; less than `num_tokens`. While it runs its
        tables have blocks for these and no more."""


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What the prefix cache holds of a waiting sequence."""

    #: Full blocks at its start that need no computing; at least one token is left.
    num_blocks: int = 0
    #: How many physical ones behind them nobody uses now.
    num_unused: int = 0
    #: The full block after them, if there is one.
    next_id: BlockId | None = None


class Groups(NamedTuple):
    """The KV groups of a model: how many keep everything, and how many physical
    blocks of one sequence each of the others needs at most."""

    num_full: int = 1
    windowed: tuple[int, ...] = ()

    def physical(self, table_blocks: int) -> int:
        """Physical blocks that a table of this length, not shortened yet, stands for."""
        return table_blocks * (self.num_full + len(self.windowed))

    def most(self, table_blocks: int) -> int:
        """Physical blocks that a sequence takes at most to grow by this many."""
        return table_blocks * self.num_full + sum(min(table_blocks, n) for n in self.windowed)


_ONE_GROUP = Groups()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a decision depends on. Nothing of it changes while `schedule` runs."""

    #: In order.
    running: Sequence[Schedulable]
    #: In the order in which they should be admitted; read only as far as needed.
    waiting: Iterable[Schedulable]
    #: Physical.
    num_available_blocks: int
    block_size: int
    max_step_tokens: int
    max_sequences: int
    #: Looked at only for a sequence that might be admitted.
    cached_prefix: Callable[[Schedulable], CachedPrefix]
    #: Physical blocks that no other sequence uses; looked at only to preempt.
    num_exclusive_blocks: Callable[[Schedulable], int]
    groups: Groups = _ONE_GROUP
    #: Full blocks that running sequences will have computed soon.
    coming: Container[BlockId] = ()


class Chunk(NamedTuple):
    """Lengthen a sequence's tables by `num_new_blocks`, then compute its next `num_tokens`.

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
    step = _Step(snapshot)
    step.serve_running()
    if not step.decision.preempted:
        step.admit()
    return step.decision


class _Step:
    """One decision in the making."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.decision = Decision()
        self._snapshot = snapshot
        self._running = list(snapshot.running)
        self._available = snapshot.num_available_blocks
        #: Physical blocks that running prefills will take in later steps.
        self._promised = 0
        num_decodes = 0
        for item in self._running:
            if item.num_tokens - item.num_computed == 1:
                num_decodes += 1
        self._budget = snapshot.max_step_tokens - num_decodes

    def serve_running(self) -> None:
        """Give each running sequence its next tokens and blocks, preempting from the end."""
        running, decision = self._running, self.decision
        per_block = self._snapshot.groups.physical(1)
        block_size = self._snapshot.block_size
        at = 0
        while at < len(running):
            item = running[at]
            at += 1
            num_computed = item.num_computed
            if item.num_tokens - num_computed > 1:
                self._prefill(item, at)
            elif num_computed % block_size:
                decision.decodes.append(Chunk(item.sequence_id, 1))
            elif self._make_room(per_block, at):
                self._available -= per_block
                decision.decodes.append(Chunk(item.sequence_id, 1, 1))

    def _prefill(self, item: Schedulable, served: int) -> None:
        """A chunk of as many tokens as the step has left and blocks are there for."""
        snapshot = self._snapshot
        block_size, per_block = snapshot.block_size, snapshot.groups.physical(1)
        start, held = item.num_computed, blocks_for(item.num_computed, block_size)
        num_tokens = min(item.num_tokens - start, self._budget)
        if num_tokens < 1:
            self._promise(item, held)
            return
        is_full = held * block_size == start
        if is_full and not self._make_room(per_block, served):
            return
        fitting = (held + self._available // per_block) * block_size - start
        num_tokens = min(num_tokens, fitting)
        new = blocks_for(start + num_tokens, block_size) - held
        self._available -= new * per_block
        self._budget -= num_tokens
        self._promise(item, held + new)
        self.decision.prefills.append(Chunk(item.sequence_id, num_tokens, new))

    def _promise(self, item: Schedulable, num_blocks: int) -> None:
        rest = blocks_for(item.num_tokens, self._snapshot.block_size) - num_blocks
        self._promised += self._snapshot.groups.most(rest)

    def _make_room(self, needed: int, served: int) -> bool:
        """Preempt from the end until `needed` blocks are there; False if that took the
        sequence itself, which is the last of the `served` first ones."""
        while needed > self._available:
            victim = self._running.pop()
            self._available += self._snapshot.num_exclusive_blocks(victim)
            self.decision.preempted.append(victim.sequence_id)
            if len(self._running) < served:
                return False
        return True

    def admit(self) -> None:
        """Admit waiting sequences in order; each takes its first chunk now."""
        snapshot = self._snapshot
        block_size, groups = snapshot.block_size, snapshot.groups
        slots = snapshot.max_sequences - len(self._running)
        # Each look costs time, and a crowd may wait for one prefix.
        passes = 2 * snapshot.max_sequences
        growing = len(self._running) * groups.physical(1)
        free = self._available - self._promised
        begun: set[BlockId] = set()
        for item in snapshot.waiting if slots > 0 and self._budget > 0 else ():
            cached = snapshot.cached_prefix(item)
            if cached.next_id in begun or cached.next_id in snapshot.coming:
                passes -= 1
                if not passes:
                    return
                continue
            rest = blocks_for(item.num_tokens, block_size) - cached.num_blocks
            taken = groups.most(rest) + cached.num_unused
            if growing and taken + growing > free:
                return
            start = cached.num_blocks * block_size
            num_tokens = min(item.num_tokens - start, self._budget)
            # Alone on the machine it may need more than is free for one step.
            fitting = (self._available - cached.num_unused) // groups.physical(1) * block_size
            num_tokens = min(num_tokens, fitting)
            if num_tokens < 1:
                return
            new = blocks_for(start + num_tokens, block_size) - cached.num_blocks
            self.decision.admissions.append(
                Chunk(item.sequence_id, num_tokens, new, cached.num_blocks)
            )
            if cached.next_id is not None:
                begun.add(cached.next_id)
            self._budget -= num_tokens
            self._available -= groups.physical(new) + cached.num_unused
            free -= taken
            growing += groups.physical(1)
            slots -= 1
            if not slots or not self._budget:
                return
