"""Each worker as the policy is told of it: its load, what it holds of a prompt, what is coming.

A load is put together when it is first asked for and kept until something changes it:
a reservation, another router's word, or the worker's own. Decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from services.router.fleet import TIERS
from services.router.policies import Candidate, Load

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.router.block_table import Ids
    from services.router.coming import Coming
    from services.router.fleet import Fleet, Worker
    from services.router.peer_loads import PeerLoads
    from services.router.reservations import Reservations, WorkerKey

#: Without a worker's word: bringing a block from a slower tier takes this share of
#: computing it anew. A tier that took more would not be worth having.
TRANSFER_SHARE = 0.25


class Candidates:
    """Makes candidates from what `fleet`, `reservations` and `peers` know now."""

    def __init__(self, fleet: Fleet, reservations: Reservations, peers: PeerLoads) -> None:
        #: Called after any change of any worker's load.
        self.on_change: Callable[[], None] = lambda: None
        self._index = fleet.index
        self._reservations = reservations
        self._peers = peers
        #: Workers for a prompt of which they hold nothing, until something changes them.
        self._blanks: dict[WorkerKey, Candidate] = {}
        for hook in (reservations, peers):
            hook.on_change = self._changed
        fleet.on_report.append(self._reported)
        fleet.on_timing.append(lambda worker: self._changed(worker.key))
        fleet.on_leave.append(lambda _, worker: self._changed(worker.key))

    def of(
        self, workers: Sequence[Worker], block_ids: Ids | Sequence[int], num_tokens: int
    ) -> list[Candidate]:
        """`workers` for a prompt of `num_tokens` tokens with the full blocks `block_ids`."""
        reaches = self._index.reaches(block_ids)
        overlaps = reaches[0]
        has_tiers = len(reaches) > 1
        coming = self._reservations.coming.workers if len(block_ids) else {}
        first = int(block_ids[0]) if coming else 0
        blanks = self._blanks
        details = _Prompt(block_ids, num_tokens, reaches, self._reservations.coming)
        candidates = []
        for worker in workers:
            key = worker.key
            candidate = blanks.get(key) or self._blank(worker)
            held = overlaps.get(worker.slot, 0)
            if held or has_tiers or (key in coming and first in coming[key]):
                candidate = details.candidate(worker, candidate, held)
            candidates.append(candidate)
        return candidates

    def _reported(self, worker: Worker) -> None:
        said, key = worker.load, worker.key
        running = said.active_sequences + said.queued_sequences
        reserved = self._reservations.load(key).sequences + self._peers.load(key).sequences
        self._reservations.unreported.reported(key, max(0, reserved - running))
        self._changed(key)

    def _changed(self, worker: WorkerKey) -> None:
        self._blanks.pop(worker, None)
        self.on_change()

    def _blank(self, worker: Worker) -> Candidate:
        blank = Candidate(worker.key.worker_id, 0, self._load(worker), worker.latency.timing)
        self._blanks[worker.key] = blank
        return blank

    def _load(self, worker: Worker) -> Load:
        """What the worker reported, and what was reserved since.

        Of other routers it is not known how much of theirs is reported: it counts whole.
        All that is reserved, prompts counted whole until their first token, bounds it,
        unless somebody else uses the worker. Blocks are those that run, as reported,
        and those that prompts not yet computed will take: summed over requests, a
        prefix that they share would count many times.
        """
        said, card = worker.load, worker.card
        reserved = self._reservations.load(worker.key)
        elsewhere = self._peers.load(worker.key)
        prefill_tokens = reserved.prefill_tokens + elsewhere.prefill_tokens
        sequences = reserved.sequences + elsewhere.sequences
        running = said.active_sequences + said.queued_sequences
        known = said.queued_prefill_tokens + elsewhere.prefill_tokens
        known += self._reservations.unreported.prefill_tokens(worker.key)
        if known < prefill_tokens or running > sequences:
            prefill_tokens = known
        return Load(
            prefill_tokens,
            running if running > sequences else sequences,
            said.used_blocks + -(-prefill_tokens // card.model.block_size),
            said.total_blocks or card.total_blocks,
            card.max_sequences,
            card.model.block_size,
        )


class _Prompt:
    """One prompt, for the workers that hold some of it, or will."""

    __slots__ = ("_block_ids", "_coming", "_ids", "_num_tokens", "_reaches")

    def __init__(
        self,
        block_ids: Ids | Sequence[int],
        num_tokens: int,
        reaches: list[dict[int, int]],
        coming: Coming,
    ) -> None:
        self._block_ids = block_ids
        self._num_tokens = num_tokens
        self._reaches = reaches
        self._coming = coming
        self._ids: list[int] | None = None

    def candidate(self, worker: Worker, blank: Candidate, held: int) -> Candidate:
        """`blank`, with the blocks that the worker has: `held` of them on the device."""
        block_size = worker.card.model.block_size
        # The engine computes the last token at least, to have logits to sample from.
        most = (self._num_tokens - 1) // block_size
        if held >= most:
            tokens = most * block_size
            return Candidate(blank[0], tokens, blank[2], blank[3], 0, 0.0, tokens)
        slower, transfer_ms = 0, 0.0
        if len(self._reaches) > 1 and len(worker.card.tiers) > 1:
            slower, transfer_ms = _slower(worker, self._reaches, held, most)
        reach = held
        if worker.key in self._coming.workers:
            if self._ids is None:
                self._ids = as_list(self._block_ids)
            reach = min(self._coming.reach(worker.key, self._ids, held), most)
        return Candidate(
            blank[0],
            held * block_size,
            blank[2],
            blank[3],
            slower * block_size,
            transfer_ms,
            reach * block_size,
        )


def as_list(block_ids: Ids | Sequence[int]) -> list[int]:
    """As Python's own numbers, which the sets of what is coming hold."""
    return block_ids.tolist() if isinstance(block_ids, np.ndarray) else list(block_ids)


def _slower(
    worker: Worker, reaches: list[dict[int, int]], held: int, most: int
) -> tuple[int, float]:
    """How many blocks after those `held` on the device lie in slower tiers, and in ms what
    bringing them takes: the card's figure for the tier, or a share of computing them."""
    card, timing = worker.card, worker.latency.timing
    said = dict(zip(card.tiers, card.tier_ms_per_block, strict=False))
    slower, transfer_ms, reached = 0, 0.0, held
    for tier, reach in enumerate(reaches[1:], start=1):
        blocks = min(reach.get(worker.slot, 0), most) - reached
        if blocks <= 0:
            continue
        ms_per_block = said.get(TIERS[tier])
        if ms_per_block is not None:
            transfer_ms += blocks * ms_per_block
        else:
            num_tokens = blocks * card.model.block_size
            cached = reached * card.model.block_size
            transfer_ms += TRANSFER_SHARE * timing.prefill_ms(num_tokens, cached)
        slower += blocks
        reached += blocks
    return slower, transfer_ms
