"""How a prompt is sent and its output timed: OpenAI's HTTP API, or our gRPC.

A client fills in a `Sample` and raises nothing for a request that fails: the kind of
failure is a figure too. Each piece of output is timed in the callback that brings it.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import msgspec

from headrace.bench.http import BrokenError, Connection
from headrace.errors import StartupError

if TYPE_CHECKING:
    from headrace.bench.sample import Prompt, Sample

_CONNECT_S = 10.0
#: A channel carries some hundred streams; more channels find more gateways.
_NUM_CHANNELS = 4


class Options(msgspec.Struct, frozen=True):
    """How every request is asked."""

    model: str = ""
    chat: bool = True
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout_s: float = 600.0
    api_key: str = ""


class Client(Protocol):
    """Sends requests to one target. `open` it first; `close` it at the end."""

    async def open(self) -> str:
        """Find the target and the model. Returns its name. Raises StartupError."""

    async def generate(self, prompt: Prompt, sample: Sample) -> None:
        """One request, into `sample`. Raises nothing but CancelledError."""

    async def close(self) -> None: ...


def client_for(target: str, options: Options) -> Client:
    """By the target's scheme. Raises StartupError."""
    scheme = urlsplit(target).scheme
    if scheme == "grpc":
        return GrpcClient(target, options)
    if scheme in ("http", "https"):
        return HttpClient(target, options)
    raise StartupError(
        f"the target must be grpc://HOST:PORT or http://HOST:PORT/v1, not {target!r}"
    )


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


class HttpClient:
    """Any server with OpenAI's `/chat/completions` or `/completions`, streamed."""

    def __init__(self, target: str, options: Options) -> None:
        url = urlsplit(target)
        if not url.hostname:
            raise StartupError(f"the target must be http://HOST:PORT/v1, not {target!r}")
        self._target = target
        self._host = url.hostname
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._port = url.port or (443 if self._tls else 80)
        self._path = url.path.rstrip("/")
        self._options = options
        self._idle: list[Connection] = []
        self._head = b""
        self._model = options.model

    async def open(self) -> str:
        key = f"Authorization: Bearer {self._options.api_key}\r\n" if self._options.api_key else ""
        host = f"Host: {self._host}:{self._port}\r\n"
        listing = f"GET {self._path}/models HTTP/1.1\r\n{host}{key}\r\n"
        status, body = await self._fetch(listing.encode())
        if not self._model:
            self._model = _only_model(status, body, self._target)
        path = f"{self._path}/{'chat/completions' if self._options.chat else 'completions'}"
        self._head = (
            f"POST {path} HTTP/1.1\r\n{host}{key}Content-Type: application/json\r\n"
            "Accept: text/event-stream\r\nContent-Length: "
        ).encode()
        return self._model

    async def generate(self, prompt: Prompt, sample: Sample) -> None:
        body = self._body(prompt)
        data = b"%b%d\r\n\r\n%b" % (self._head, len(body), body)
        reader = _EventReader(sample)
        try:
            async with asyncio.timeout(self._options.timeout_s):
                connection = await self._send(data, reader)
            if connection.is_reusable:
                self._idle.append(connection)
        except TimeoutError:
            sample.fail("timeout", f"longer than {self._options.timeout_s:g} s")
        except OSError as error:
            sample.fail("can't connect", str(error))
        except BrokenError as error:
            sample.fail("connection", str(error))
        sample.ended_at = time.perf_counter()
        reader.finish()

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _send(self, data: bytes, reader: _EventReader) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            try:
                await connection.request(data, reader.on_head, reader.on_body)
            except BrokenError:
                # It may have been closed while it was idle: then nothing has come of it.
                if reader.has_begun:
                    raise
            else:
                return connection
        connection = await Connection.open(self._host, self._port, self._tls)
        await connection.request(data, reader.on_head, reader.on_body)
        return connection

    async def _fetch(self, data: bytes) -> tuple[int, bytes]:
        status, body = 0, bytearray()

        def on_head(code: int) -> None:
            nonlocal status
            status = code

        try:
            async with asyncio.timeout(_CONNECT_S):
                connection = await Connection.open(self._host, self._port, self._tls)
                await connection.request(data, on_head, body.extend)
        except (OSError, BrokenError) as error:
            raise StartupError(f"nothing answers at {self._target}: {error}") from error
        connection.close()
        return status, bytes(body)

    def _body(self, prompt: Prompt) -> bytes:
        options = self._options
        fields: dict[str, Any] = {
            "model": self._model,
            "max_tokens": prompt.max_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.chat:
            fields["messages"] = [{"role": "user", "content": prompt.text}]
        else:
            fields["prompt"] = prompt.text
        if options.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields)


class _EventReader:
    """Server-sent events into one sample."""

    def __init__(self, sample: Sample) -> None:
        self.has_begun = False
        self._sample = sample
        self._status = 0
        self._buffer = b""
        self._is_complete = False

    def on_head(self, status: int) -> None:
        self.has_begun = True
        self._status = status

    def on_body(self, data: bytes) -> None:
        now = time.perf_counter()
        data = self._buffer + data
        if self._status != 200:
            self._buffer = data[:65536]
            return
        if b"\r\n" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._buffer = data.split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                self._on_event(event[5:].strip(), now)

    def finish(self) -> None:
        """The answer is over."""
        if self._status not in (0, 200):
            self._sample.fail(f"HTTP {self._status}", _error_text(self._buffer))
        elif not self._is_complete:
            self._sample.fail("cut", "the stream ended before it was done")
        if not self._sample.output_tokens:
            # No usage: every event is taken for a token.
            self._sample.output_tokens = len(self._sample.deltas)

    def _on_event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._is_complete = True
            return
        try:
            event = _decode_event(data)
        except msgspec.MsgspecError as error:
            self._sample.fail("not understood", f"{error}: {data[:200]!r}")
            return
        if event.error is not None:
            self._sample.fail("error in the stream", str(event.error))
        for choice in event.choices:
            delta = choice.delta
            if choice.text or (
                delta is not None
                and (
                    delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls
                )
            ):
                self._sample.deltas.append(now)
        if event.usage is not None:
            self._sample.prompt_tokens = event.usage.prompt_tokens
            self._sample.output_tokens = event.usage.completion_tokens or 0
            if event.usage.prompt_tokens_details is not None:
                self._sample.cached_tokens = event.usage.prompt_tokens_details.cached_tokens or 0


def _error_text(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _only_model(status: int, body: bytes, target: str) -> str:
    if status != 200:
        raise StartupError(f"{target}/models answers HTTP {status}: {_error_text(body)}")
    try:
        names = [str(entry["id"]) for entry in msgspec.json.decode(body)["data"]]
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise StartupError(f"{target}/models lists no models: name one with --model") from error
    return _only(names)


def _only(names: list[str]) -> str:
    if len(names) != 1:
        raise StartupError(f"choose a model with --model; served: {', '.join(names) or 'none'}")
    return names[0]


class GrpcClient:
    """headrace.v1.InferenceService."""

    def __init__(self, target: str, options: Options) -> None:
        self._address = urlsplit(target).netloc
        self._options = options
        self._channels: list[Any] = []
        self._calls: list[Any] = []
        self._next = 0
        self._model = options.model

    async def open(self) -> str:
        import grpc

        from headrace.rpc.options import MAX_MESSAGE_LEN
        from headrace.v1 import inference_pb2 as pb
        from headrace.v1 import inference_pb2_grpc

        settings = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_LEN),
            ("grpc.max_send_message_length", MAX_MESSAGE_LEN),
            # Each channel a connection of its own.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channels = [
            grpc.aio.insecure_channel(self._address, options=settings) for _ in range(_NUM_CHANNELS)
        ]
        stubs: list[Any] = [inference_pb2_grpc.InferenceServiceStub(c) for c in self._channels]
        self._calls = [stub.Generate for stub in stubs]
        if not self._model:
            try:
                listed = await stubs[0].ListModels(pb.ListModelsRequest(), timeout=_CONNECT_S)
            except grpc.aio.AioRpcError as error:
                raise StartupError(
                    f"nothing answers at grpc://{self._address}: {error.details()}"
                ) from error
            self._model = _only([model.card.name for model in listed.models])
        return self._model

    async def generate(self, prompt: Prompt, sample: Sample) -> None:
        import grpc

        self._next = (self._next + 1) % len(self._calls)
        call = self._calls[self._next](self._request(prompt), timeout=self._options.timeout_s)
        clock, deltas, num_tokens = time.perf_counter, sample.deltas, 0
        try:
            async for response in call:
                if response.token_ids:
                    deltas.append(clock())
                    num_tokens += len(response.token_ids)
                if response.HasField("usage"):
                    sample.prompt_tokens = response.usage.prompt_tokens
                    sample.cached_tokens = response.usage.cached_tokens
        except grpc.aio.AioRpcError as error:
            sample.fail(error.code().name, error.details() or "")
        finally:
            call.cancel()
        sample.output_tokens = num_tokens
        sample.ended_at = clock()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def _request(self, prompt: Prompt) -> Any:
        from headrace.v1 import inference_pb2 as pb
        from headrace.v1 import types_pb2

        options = self._options
        request = pb.GenerateRequest(
            model=self._model,
            sampling=types_pb2.SamplingParams(
                max_tokens=prompt.max_tokens,
                temperature=options.temperature,
                ignore_eos=options.ignore_eos,
            ),
        )
        if options.chat:
            request.chat.messages.add(role="user", content=prompt.text)
        else:
            request.prompt = prompt.text
        return request
