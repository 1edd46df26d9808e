"""The sink of a streamed answer: tokens to bytes to the connection, in one call.

Each token is written from the pipeline's callback straight into the connection's
buffer; no queue, task, future or await is touched per token. A stream's life:

    held  -- first token --> the handler sends the headers --> attached --> over
      \\__ an error ________> the handler answers with a status

While held, output is kept here; once attached, it goes to the transport. The
transport's own framing is bypassed, so this module writes HTTP/1.1 chunks itself
and plain bytes to HTTP/1.0, which knows none.

It refuses to know what an event says: bytes come from an `EventTemplate`.
"""

from __future__ import annotations

import logging
import secrets
import socket
from typing import TYPE_CHECKING

import msgspec

from headrace.errors import Cancelled, HeadraceError
from services.gateway.http.errors import error_body, problem_of
from services.gateway.http.responses import error_event
from services.gateway.http.view import SequenceView

if TYPE_CHECKING:
    import asyncio

    from services.gateway.generation import EndReason, Usage
    from services.gateway.http.responses import EventTemplate
    from services.gateway.http.view import Shown, View

log = logging.getLogger("headrace.gateway.http")

#: Output that may wait in our memory for a client that does not read.
DEFAULT_MAX_BUFFER_LEN = 1 << 20
#: What the kernel may hold of a stream: by itself it takes 4 MB before we notice.
SEND_BUFFER_LEN = 64 << 10
#: Bytes that characters of obfuscation are drawn from.
_OBFUSCATION_LEN = 12

_escape = msgspec.json.Encoder().encode
_join = b"".join
#: Chunk heads by the chunk's length; longer ones are formatted.
_HEADS = tuple(b"%x\r\n" % length for length in range(2048))


def chunk_head(length: int) -> bytes:
    """What goes before a chunk of `length` bytes."""
    return _HEADS[length] if length < len(_HEADS) else b"%x\r\n" % length


class StreamingSink:
    """One stream's output. All methods are called on the event loop.

    `started` is set at the first output, the end or the error; `done` at the end,
    whatever it is; `error` and `usage` say which.
    """

    __slots__ = (
        "_chunked",
        "_closed",
        "_held",
        "_max_buffer_len",
        "_prefixes",
        "_suffix",
        "_template",
        "_transport",
        "done",
        "error",
        "started",
        "usage",
    )

    def __init__(
        self,
        template: EventTemplate,
        loop: asyncio.AbstractEventLoop,
        *,
        chunked: bool,
        max_buffer_len: int = DEFAULT_MAX_BUFFER_LEN,
    ) -> None:
        self.started: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.error: HeadraceError | None = None
        self.usage: Usage | None = None
        self._template = template
        self._prefixes = template.prefixes
        self._suffix = template.suffix
        self._chunked = chunked
        self._max_buffer_len = max_buffer_len
        self._held = bytearray(template.opening)
        self._transport: asyncio.Transport | None = None
        self._closed = False

    def take(self) -> bytes:
        """What is held."""
        held, self._held = bytes(self._held), bytearray()
        return held

    def attach(self, transport: asyncio.Transport | None) -> None:
        """The headers are sent: from now on output goes to `transport`, None if it is gone."""
        if transport is None:
            self.close()
            return
        _limit_kernel_buffer(transport)
        held = self.take()
        self._transport = transport
        self._write(held)

    def close(self) -> None:
        """Nobody reads any more: whatever still comes is dropped."""
        self._closed = True
        self._transport = None
        self._held.clear()
        _set(self.started)
        _set(self.done)

    def on_delta(self, index: int, text: str, token_ids: list[int], logprobs: bytes = b"") -> None:
        """Write one event; the plain twin is `EventTemplate.text` and `_write`."""
        transport = self._transport
        if transport is None or not self._chunked or not text:
            if text:
                self._write(self._template.text(index, text))
            _set(self.started)
            return
        prefix, escaped, suffix = self._prefixes[index], _escape(text), self._suffix
        length = len(prefix) + len(escaped) + len(suffix)
        head = _HEADS[length] if length < 2048 else chunk_head(length)
        if transport.is_closing():
            return
        try:
            transport.write(_join((head, prefix, escaped, suffix, b"\r\n")))
        except RuntimeError:
            # uvloop's answer if the connection closed since; the handler is told as well.
            self.close()
            return
        if transport.get_write_buffer_size() > self._max_buffer_len:
            self._abandon()

    def on_prompt_logprobs(self, index: int, data: bytes) -> None:
        """No request asks for them here."""

    def on_end(self, index: int, reason: EndReason) -> None:
        """Write the event that ends sequence `index`."""
        self._write(self._template.end(index, reason))
        _set(self.started)

    def on_done(self, usage: Usage) -> None:
        """Write what ends the stream."""
        self.usage = usage
        self._write(self._template.closing(usage))
        self._finish()

    def on_error(self, error: HeadraceError) -> None:
        """Before the headers: leave the answer to the handler. After: end with an event."""
        self.error = error
        if self._transport is not None:
            self._write(error_event(error_body(problem_of(error))))
        self._finish()

    def _finish(self) -> None:
        _set(self.started)
        _set(self.done)

    def _write(self, data: bytes) -> None:
        if self._closed or not data:
            return
        transport = self._transport
        if transport is None:
            self._held += data
            if len(self._held) > self._max_buffer_len:
                self._abandon()
            return
        if transport.is_closing():
            return
        if self._chunked:
            data = _join((chunk_head(len(data)), data, b"\r\n"))
        try:
            transport.write(data)
        except RuntimeError:
            self.close()
            return
        if transport.get_write_buffer_size() > self._max_buffer_len:
            self._abandon()

    def _abandon(self) -> None:
        """The client does not read: stop here, before its output fills our memory."""
        self.error = Cancelled(
            f"the client does not read: more than {self._max_buffer_len} bytes wait for it"
        )
        log.warning("a stream is cut: %s", self.error)
        transport = self._transport
        self.close()
        if transport is not None:
            transport.abort()


class ViewingSink(StreamingSink):
    """The same for an answer with more than text: `view` says what its chunks hold."""

    __slots__ = ("_sequences", "_view")

    def __init__(
        self,
        template: EventTemplate,
        loop: asyncio.AbstractEventLoop,
        *,
        view: View,
        chunked: bool,
        max_buffer_len: int = DEFAULT_MAX_BUFFER_LEN,
    ) -> None:
        super().__init__(template, loop, chunked=chunked, max_buffer_len=max_buffer_len)
        self._view = view
        self._sequences: dict[int, SequenceView] = {}

    def on_delta(self, index: int, text: str, token_ids: list[int], logprobs: bytes = b"") -> None:
        """Write the events that this completes."""
        self._show(index, self._sequence(index).push(text, logprobs))
        _set(self.started)

    def on_prompt_logprobs(self, index: int, data: bytes) -> None:
        """Keep them for the echo."""
        self._sequence(index).on_prompt_logprobs(data)

    def on_end(self, index: int, reason: EndReason) -> None:
        """Write what is left of sequence `index`, and its end."""
        sequence = self._sequence(index)
        self._show(index, sequence.end())
        self._write(self._template.end(index, sequence.reason(reason)))
        _set(self.started)

    def on_done(self, usage: Usage) -> None:
        """Write what ends the stream."""
        super().on_done(self._view.usage(usage))

    def _sequence(self, index: int) -> SequenceView:
        found = self._sequences.get(index)
        if found is None:
            found = self._sequences[index] = SequenceView(self._view, index)
        return found

    def _show(self, index: int, shown: list[Shown]) -> None:
        for fields, logprobs in shown:
            padding = ""
            if self._view.wishes.obfuscate:
                padding = secrets.token_urlsafe(_OBFUSCATION_LEN)[: 1 + secrets.randbelow(16)]
            self._write(self._template.shown(index, fields, logprobs, padding))


def _limit_kernel_buffer(transport: asyncio.Transport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_LEN)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
