"""The list of models in Redis: who may name a model, and how many partitions it has.

A model's first worker puts its card there. Others whose card disagrees leave it as
it is, and routers refuse them, until nobody else serves the model: then one of them
may replace it. What the list says of partitions holds for every worker.

It knows nothing of blocks and leases.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from headrace import registry

if TYPE_CHECKING:
    from headrace.redis_servers import Servers
    from headrace.registry import ModelCard

log = logging.getLogger("headrace.worker")


class ModelListing:
    """One worker's view of the list. Its methods raise redis-py's errors."""

    def __init__(self, servers: Servers, worker_id: str) -> None:
        self._servers = servers
        self._worker_id = worker_id.encode()

    async def register(self, card: ModelCard) -> int:
        """List the model with this card, unless others serve it. Returns its partitions."""
        listed = await self._listed(card)
        if listed == card:
            return listed.num_partitions
        return await self._replace(listed, card)

    async def renew(self, card: ModelCard) -> int:
        """List the model again if it was lost, or free it. Returns its partitions."""
        listed = await self._listed(card)
        if all(getattr(listed, field) == getattr(card, field) for field in registry.MODEL_IDENTITY):
            return listed.num_partitions
        return await self._replace(listed, card)

    async def _listed(self, card: ModelCard) -> ModelCard:
        """What is listed; `card`, if nothing was or could be read."""
        redis: Any = await self._servers.of(registry.MODELS_KEY)
        data = await redis.hget(registry.MODELS_KEY, card.name)
        if data is None:
            await redis.hsetnx(registry.MODELS_KEY, card.name, registry.encode_card(card))
            data = await redis.hget(registry.MODELS_KEY, card.name)
        try:
            return registry.decode_model_card(data or b"")
        except ValueError as error:
            log.error("the listed card of model %s is malformed, replaced: %s", card.name, error)
            await redis.hset(registry.MODELS_KEY, card.name, registry.encode_card(card))
            return card

    async def _replace(self, listed: ModelCard, card: ModelCard) -> int:
        for partition in range(listed.num_partitions):
            key = registry.Keys(card.name, partition).workers
            redis = await self._servers.of(key)
            # Two of them: one may be this worker.
            if set(await redis.zrange(key, 0, 1)) - {self._worker_id}:
                return listed.num_partitions
        redis = await self._servers.of(registry.MODELS_KEY)
        await redis.hset(registry.MODELS_KEY, card.name, registry.encode_card(card))
        return card.num_partitions
