"""The tokenizer service's composition: a pool behind a port."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from headrace import status
from headrace.errors import StartupError
from headrace.models.store import resolve
from headrace.rpc.server import Server
from headrace.service import settle_garbage
from headrace.v1.tokenizer_pb2_grpc import add_TokenizerServiceServicer_to_server
from services.tokenizer.pool import Pool, PoolLimits
from services.tokenizer.servicer import SERVICE_NAME, TokenizerServicer
from services.tokenizer.work import Limits

if TYPE_CHECKING:
    import asyncio

    from headrace.models.files import ModelFiles
    from services.tokenizer.config import Config

log = logging.getLogger("headrace.tokenizer")

#: What is under way at the end may take so long to finish.
_DRAIN_S = 3.0


class App:
    """A whole tokenizer service. `start` once, `close` at the end."""

    def __init__(self, config: Config) -> None:
        _check(config)
        self.server = Server(config.listen, [SERVICE_NAME])
        self.pool = Pool(
            _models(config.model),
            config.processes or max(2, (os.cpu_count() or 1) - 1),
            PoolLimits(max_queued_bytes=config.max_queued_bytes, stall_s=config.stall_s),
            Limits(
                config.max_text_bytes,
                config.max_messages,
                config.max_tokens,
                config.max_texts,
                config.prefix_cache_bytes,
            ),
        )
        servicer = TokenizerServicer(self.pool)
        add_TokenizerServiceServicer_to_server(servicer, self.server.grpc_server)

    async def start(self) -> None:
        """Bind, load, serve. Raises StartupError."""
        try:
            # A port in use is found before anything is loaded.
            await self.server.start()
            await self.pool.start()
        except BaseException:
            await self.close()
            raise
        await self.server.set_serving(True)

    async def close(self) -> None:
        """Finish what is under way, then end all processes. Clients ask again elsewhere."""
        await self.server.set_serving(False)
        await self.pool.drain(_DRAIN_S)
        await self.server.stop()
        await self.pool.close()


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Serve until `stop`."""
    status.report("loading vocabularies")
    app = App(config)
    await app.start()
    settle_garbage()
    status.report(status.READY)
    names = ", ".join(info.model for info in app.pool.infos)
    log.info("port %d: %s in %d processes", app.server.port, names, len(app.pool.worker_pids))
    try:
        await stop.wait()
    finally:
        await app.close()


def _check(config: Config) -> None:
    for name in ("processes", "max_queued_bytes", "stall_s", "prefix_cache_bytes"):
        if getattr(config, name) < 0:
            flag = name.replace("_", "-")
            raise StartupError(f"--{flag} must be 0 or more, not {getattr(config, name)}")
    for name in ("max_text_bytes", "max_messages", "max_tokens", "max_texts"):
        if getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise StartupError(f"--{flag} must be 1 or more, not {getattr(config, name)}")
    if not config.model:
        raise StartupError("--model is required: the service needs one model at least")


def _models(specs: tuple[str, ...]) -> list[ModelFiles]:
    models: dict[str, ModelFiles] = {}
    for spec in specs:
        files = resolve(spec)
        if files.name in models:
            raise StartupError(f"--model {spec}: there is a model named {files.name} already")
        models[files.name] = files
    return list(models.values())
