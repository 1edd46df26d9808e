"""Workers as a router sees them, without engines: what stands in Redis, and Watch streams.

`python -m benchmarks.harness.published_workers REDIS_PORT NUM_WORKERS` publishes that many
and serves them in one process until it is killed. Worker w holds the prompts w, w + n, …
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import TYPE_CHECKING, Any

import grpc

from headrace import blocks, registry
from headrace.registry import Keys, ModelCard, WorkerCard
from headrace.rpc import options
from headrace.v1 import worker_pb2, worker_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NUM_PROMPTS = 400
PROMPT_LEN = 2000
BLOCK_SIZE = 16
MODEL = ModelCard("bench", "r", "digest", context_len=65536, block_size=BLOCK_SIZE)
#: Longer than a benchmark: nobody renews.
_TTL_MS = 900_000
_SAYS_S = 0.5


def prompt(number: int) -> bytes:
    """The packed block ids of a prompt: random, as hashes are."""
    return random.Random(number).randbytes(PROMPT_LEN // BLOCK_SIZE * blocks.ID_LEN)


class _Watched(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, card: WorkerCard) -> None:
        self._message = worker_pb2.WatchResponse()
        self._message.worker.worker_id = card.worker_id
        self._message.worker.generation = card.generation

    async def Watch(
        self, request: worker_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[worker_pb2.WatchResponse]:
        while True:
            yield self._message
            await asyncio.sleep(_SAYS_S)


async def _serve(number: int, num_workers: int, redis: Any) -> grpc.aio.Server:
    server = grpc.aio.server(options=options.SERVER)
    port = server.add_insecure_port("127.0.0.1:0")
    vector = blocks.hash_vector(BLOCK_SIZE).hex()
    card = WorkerCard(
        f"w{number}", 1, f"127.0.0.1:{port}", MODEL, "sim", vector, 100_000, lease_ttl_ms=_TTL_MS
    )
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(_Watched(card), server)
    await server.start()
    held = [prompt(at) for at in range(number, NUM_PROMPTS, num_workers)]
    ids = [block for packed in held for block in blocks.short_ids(packed)]
    keys, name = Keys(MODEL.name), card.worker_id
    async with redis.pipeline(transaction=True) as pipe:
        pipe.hset(registry.MODELS_KEY, MODEL.name, registry.encode_card(MODEL))
        pipe.zadd(keys.workers, {name: int(time.time() * 1000) + _TTL_MS})
        pipe.set(keys.worker(name), registry.encode_card(card), px=_TTL_MS)
        pipe.set(keys.lease(name), 1, px=_TTL_MS)
        pipe.set(keys.owned(name, 1), registry.pack_short_ids(ids), px=_TTL_MS)
        pipe.set(keys.sequence(name, 1), 0, px=_TTL_MS)
        await pipe.execute()
    return server


async def _main(port: int, num_workers: int) -> None:
    redis = registry.connect(f"redis://127.0.0.1:{port}/0")
    servers = [await _serve(number, num_workers, redis) for number in range(num_workers)]
    await redis.aclose()
    print("published", flush=True)
    await asyncio.gather(*(server.wait_for_termination() for server in servers))


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2])))
