"""One worker with its engine started: sequences, sessions, Redis, and its end.

    engine process ─► on_step ─► Sequences ─► sessions' streams
                         ├────► Publisher ─► Redis
                         └────► watchers

It composes; each part knows only what it is handed. Its gRPC server is not its
own: it only says when to be healthy.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace import blocks, registry
from headrace.errors import StartupError
from headrace.registry import ModelCard, WorkerCard
from headrace.service import cancel_and_wait
from services.worker.attach import Sessions
from services.worker.convert import Identity, Pulse
from services.worker.dispatch import Sequences
from services.worker.publisher import Published, Publisher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from headrace.models.files import ModelFiles
    from services.worker.config import WorkerConfig
    from services.worker.engine import EngineInfo, EngineStats, StepOutput
    from services.worker.engine_client import EngineClient
    from services.worker.engine_wire import Submit

HEARTBEAT_S = 0.5
#: Watchers hear of changes at most this often.
WATCH_INTERVAL_S = 0.05
#: A lease is renewed several times in this; shorter ones would end at a busy moment.
MIN_LEASE_TTL_MS = 400
_DRAIN_POLL_S = 0.02
#: How long gateways may take to acknowledge the last frames of a drained worker.
_LAST_ACK_TIMEOUT_S = 2.0

log = logging.getLogger("headrace.worker")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker is: its address for others and its name."""

    address: str
    worker_id: str


class Worker:
    """Start with `start`; then `drain` and `close`. All in the event loop's thread."""

    def __init__(
        self,
        config: WorkerConfig,
        files: ModelFiles,
        engine: EngineClient,
        info: EngineInfo,
        place: Place,
        set_serving: Callable[[bool], Awaitable[None]],
    ) -> None:
        if not 1 <= config.partitions <= registry.MAX_PARTITIONS:
            raise StartupError(
                f"--partitions must be 1 to {registry.MAX_PARTITIONS}, not {config.partitions}"
            )
        if config.lease_ttl_ms < MIN_LEASE_TTL_MS:
            raise StartupError(
                f"--lease-ttl-ms must be {MIN_LEASE_TTL_MS} or more, not {config.lease_ttl_ms}"
            )
        self.engine = engine
        self.info = info
        self.model = model_card(files, info, config.partitions)
        self.sequences = Sequences(
            self, info, max_queued=config.max_queued, worker_id=place.worker_id
        )
        self.sessions = Sessions(self.sequences, config.session_grace_s, self)
        self._place = place
        self._lease_ttl_ms = config.lease_ttl_ms
        self.publisher = Publisher(config.redis, self._card)
        self._set_serving = set_serving
        self._watchers: set[asyncio.Event] = set()
        self._heart: asyncio.Task[None] | None = None
        engine.on_step = self._on_step

    def identity(self) -> Identity:
        """Who it is, now: its generation changes with every lost lease."""
        return Identity(self._place.worker_id, self.publisher.generation, self._place.address)

    def pulse(self) -> Pulse:
        """What its engine does."""
        return Pulse(self.engine.step, self.engine.step_elapsed_ms())

    def load(self) -> EngineStats:
        """The load now."""
        return self.engine.stats()

    def start(self) -> None:
        """Beat, and register in Redis."""
        self._heart = asyncio.create_task(self._beat(), name="heartbeat")
        self.publisher.start()

    async def drain(self) -> None:
        """Take nothing new, be chosen no more; what runs goes on. More than once is fine."""
        self.sequences.draining = True
        self._changed()
        await self._set_serving(False)
        await self.publisher.leave()

    async def finished(self) -> None:
        """Return when nothing runs and gateways have acknowledged all, or had time to."""
        await self.sequences.idle.wait()
        for _ in range(int(_LAST_ACK_TIMEOUT_S / _DRAIN_POLL_S)):
            if self.sessions.are_idle:
                return
            await asyncio.sleep(_DRAIN_POLL_S)

    async def close(self) -> None:
        """End streams and leave Redis. What still runs is lost here."""
        await cancel_and_wait(self._heart)
        self.sessions.close()
        await self.publisher.leave()

    async def dump_blocks(self) -> Published:
        """The engine's blocks that are published, and the sequence they belong to.

        Blocks come from the engine itself; only what waits to be published is
        taken back, so that the answer can be compared with Redis at that sequence.
        """
        answers: list[Published] = []
        await self.engine.read_blocks(
            lambda owned: answers.append(self.publisher.published_of(owned))
        )
        return answers[0]

    async def changes(self) -> AsyncIterator[None]:
        """Once at first, then at every change of the load, not too often and not too seldom."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                yield
                await asyncio.sleep(WATCH_INTERVAL_S)
                try:
                    async with asyncio.timeout(HEARTBEAT_S - WATCH_INTERVAL_S):
                        await changed.wait()
                except TimeoutError:
                    pass
        finally:
            self._watchers.discard(changed)

    def submit(self, request: Submit) -> None:
        """See EngineHandle."""
        self.engine.submit(request)
        self._changed()

    def cancel(self, sequence_ids: list[int]) -> None:
        """See EngineHandle."""
        self.engine.cancel(sequence_ids)

    def _on_step(self, output: StepOutput) -> None:
        self.sequences.on_step(output)
        if output.stored or output.removed:
            self.publisher.on_change(output.stored, output.removed)
        for tier, (stored, removed) in output.slower.items():
            self.publisher.on_change(stored, removed, tier)
        self._changed()

    def _changed(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.sessions.beat()

    def _card(self, generation: int) -> WorkerCard:
        return WorkerCard(
            worker_id=self._place.worker_id,
            generation=generation,
            address=self._place.address,
            model=self.model,
            engine=self.info.engine,
            hash_vector=blocks.hash_vector(self.info.block_size).hex(),
            total_blocks=self.info.total_blocks,
            resume=self.info.resume,
            tiers=self.info.tiers,
            tier_ms_per_block=self.info.tier_ms_per_block,
            lease_ttl_ms=self._lease_ttl_ms,
            max_sequences=self.info.max_sequences,
        )


def model_card(files: ModelFiles, info: EngineInfo, num_partitions: int = 1) -> ModelCard:
    """What workers that serve one model must agree on."""
    return ModelCard(
        name=files.name,
        revision=info.model_revision,
        tokenizer_digest=info.tokenizer_digest,
        context_len=info.context_len,
        block_size=info.block_size,
        modalities=info.modalities,
        created=int(files.path.stat().st_mtime),
        num_partitions=num_partitions,
    )
