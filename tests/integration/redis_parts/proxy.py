"""A TCP proxy before Redis that cuts connections where a test wants it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from headrace.service import cancel_and_wait


class CuttingProxy:
    """Use as an asynchronous context; clients connect to `url`."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        #: Bytes of replies that may still pass before all connections are reset; None: all.
        self._budget: int | None = None
        #: How often connections were cut.
        self.cuts = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self.url = ""

    async def __aenter__(self) -> CuttingProxy:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._reset()
        await cancel_and_wait(*self._tasks)

    def cut_after(self, reply_bytes: int) -> None:
        """Let so many bytes of replies pass, then reset everything in the middle of one."""
        self._budget = reply_bytes

    def hold(self) -> None:
        """Pass nothing on, either way, until `release`."""
        self._passing.clear()

    def release(self) -> None:
        """Pass on what was held, and what comes."""
        self._passing.set()

    def _reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connected(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        try:
            far, to_far = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            to_near.transport.abort()
            return
        self._writers |= {to_near, to_far}
        for source, target, is_reply in ((near, to_far, False), (far, to_near, True)):
            task = asyncio.create_task(self._pump(source, target, is_reply))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, is_reply: bool
    ) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                await self._passing.wait()
                if is_reply and self._budget is not None:
                    if len(data) > self._budget:
                        target.write(data[: self._budget])
                        await asyncio.sleep(0)
                        self._budget = None
                        self.cuts += 1
                        self._reset()
                        return
                    self._budget -= len(data)
                target.write(data)
                await target.drain()
        target.close()
