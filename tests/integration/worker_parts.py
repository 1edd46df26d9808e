"""What the worker's tests put around it: its process, a gateway's end, a proxy to cut."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from headrace import status
from headrace.blocks import pack_tokens
from headrace.rpc import options
from headrace.rpc.frames import CHUNK_LEN, FrameReceiver
from headrace.v1 import types_pb2, worker_pb2, worker_pb2_grpc
from services.worker.engines.sim.tokens import INITIAL_STATE, choose, fold

VOCAB_SIZE = 512
EOS = 2
CONTEXT_LEN = 4096
NAMESPACE = bytes(range(16))
WAIT_S = 20.0


def write_model(directory: Path) -> Path:
    """A model that sim can serve: a config without weights."""
    directory.mkdir(exist_ok=True)
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": CONTEXT_LEN,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "eos_token_id": EOS,
        "bos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def expected(prompt: list[int], count: int) -> list[int]:
    """What sim generates after `prompt`."""
    table = [token for token in range(VOCAB_SIZE) if token != EOS]
    state = fold(INITIAL_STATE, prompt)[-1]
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(choose(state, table))
        (state,) = fold(state, tokens[-1:])
    return tokens


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Wait for `condition()` to be true; it may return an awaitable."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        result = condition()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return result
        await asyncio.sleep(0.01)
    raise AssertionError(f"{what} did not come within {WAIT_S:.0f} s")


class WorkerProcess:
    """`python -m services.worker` over the sim engine. Use as a context."""

    def __init__(self, directory: Path, redis: str, *flags: str, **environment: str) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.worker_id = self.address
        self.log = directory / f"worker-{self.port}.log"
        self.status = directory / f"status-{self.port}"
        model = write_model(directory / "tiny")
        command = [sys.executable, "-m", "services.worker", "--engine", "sim"]
        command += ["--model", f"tiny={model}", "--listen", self.address, "--redis", redis]
        command += ["--num-blocks", "4096", *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, status.VARIABLE: str(self.status), **environment},
            )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def phase(self) -> str:
        progress = status.read(self.status)
        return progress.phase if progress else ""

    def wait_ready(self) -> WorkerProcess:
        deadline = time.monotonic() + WAIT_S
        while self.phase() != status.READY:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        return self

    def engine_pid(self) -> int:
        """The engine's process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (pid,) = children.read_text().split()
        return int(pid)

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def submission(slot: int, prompt: list[int], max_tokens: int = 8, **fields: Any) -> Any:
    """A greedy sequence."""
    sampling = fields.pop(
        "sampling", types_pb2.SamplingParams(temperature=0, seed=1, max_tokens=max_tokens)
    )
    fields = {"namespace_key": NAMESPACE, "request_id": f"request-{slot}", **fields}
    return worker_pb2.Submission(
        slot=slot,
        prompt_ids=pack_tokens(prompt),
        sampling=sampling,
        **fields,
    )


class Client:
    """A channel to a worker."""

    def __init__(self, address: str, *settings: tuple[str, int]) -> None:
        changed = dict(settings)
        kept = [option for option in options.CHANNEL if option[0] not in changed]
        self.channel = grpc.aio.insecure_channel(address, options=[*kept, *settings])
        self.stub: Any = worker_pb2_grpc.WorkerServiceStub(self.channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def load(self) -> worker_pb2.WorkerLoad:
        response = await self.stub.GetWorker(worker_pb2.GetWorkerRequest())
        load: worker_pb2.WorkerLoad = response.load
        return load

    async def stops_before(self, num_steps: int) -> None:
        """Wait for an idle engine. Fails if it got there by computing `num_steps` more."""
        before = (await self.load()).decode_steps
        await until(self.idle, "an idle engine")
        assert (await self.load()).decode_steps - before < num_steps

    async def idle(self) -> bool:
        load = await self.load()
        return load.active_sequences == 0 and load.queued_sequences == 0


class Gateway:
    """A gateway's end of one session: numbers, repeats and acknowledges as it should."""

    def __init__(self, stub: Any, session_id: str = "session", gateway_id: str = "gateway") -> None:
        self.stub = stub
        self.session_id = session_id
        self.gateway_id = gateway_id
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.ends: dict[int, worker_pb2.SequenceEnd] = {}
        self.heartbeats: list[worker_pb2.Heartbeat] = []
        self.frames: list[worker_pb2.AttachResponse] = []
        self.opened: worker_pb2.AttachOpened | None = None
        self.acknowledging = True
        self.last_ack = 0
        self.received = FrameReceiver()
        self._sent: list[worker_pb2.AttachRequest] = []
        self._last = 0
        self._call: Any = None

    async def connect(self, *, resume: bool = False) -> bool:
        """Attach; returns whether the session goes on. Repeats what is unacknowledged."""
        deadline = time.monotonic() + WAIT_S
        while True:
            if self._call is not None:
                self._call.cancel()
            self._call = self.stub.Attach(wait_for_ready=True)
            try:
                return await self._open(resume)
            except grpc.aio.AioRpcError as error:
                # The connection that was there may have been cut.
                if not resume or time.monotonic() > deadline:
                    raise AssertionError("the worker can't be attached to") from error

    async def _open(self, resume: bool) -> bool:
        opening = worker_pb2.AttachOpen(
            session_id=self.session_id, gateway_id=self.gateway_id, resume=resume
        )
        await self._call.write(worker_pb2.AttachRequest(ack=self.received.last, open=opening))
        response = await self._call.read()
        assert response.HasField("opened"), response
        self.opened = response.opened
        self._take(response)
        if resume and response.opened.resumed:
            for request in self._sent:
                await self._call.write(request)
        resumed: bool = response.opened.resumed
        return resumed

    async def send(self, **fields: Any) -> None:
        """The next numbered frame."""
        self._last += 1
        request = worker_pb2.AttachRequest(frame=self._last, ack=self.received.last, **fields)
        self._sent.append(request)
        await self._call.write(request)

    async def submit(self, *submissions: Any) -> None:
        for message in submissions:
            data = message.SerializeToString()
            if len(data) <= CHUNK_LEN:
                await self.send(submissions=[message])
                continue
            pieces = [data[i : i + CHUNK_LEN] for i in range(0, len(data), CHUNK_LEN)]
            for i, piece in enumerate(pieces):
                last = i == len(pieces) - 1
                await self.send(chunks=[types_pb2.Chunk(id=message.slot, data=piece, last=last)])

    async def read(self) -> worker_pb2.AttachResponse:
        """One frame. Raises ConnectionError at the stream's end."""
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(error.details()) from error
        if response is grpc.aio.EOF:
            raise ConnectionError("the stream ended")
        self._take(response)
        if self.acknowledging and (response.ends or (response.frame and response.frame % 8 == 0)):
            await self._call.write(worker_pb2.AttachRequest(ack=self.received.last))
        assert isinstance(response, worker_pb2.AttachResponse)
        return response

    async def read_until(self, condition: Callable[[], Any]) -> None:
        """Read frames until `condition()`; the heartbeats keep it from blocking for ever."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, "what was waited for did not come"
            await self.read()

    async def read_ends(self, *slots: int) -> None:
        await self.read_until(lambda: all(slot in self.ends for slot in slots))

    async def read_to_end(self) -> grpc.StatusCode:
        """How the stream ended, once all of it is read."""
        with suppress(ConnectionError, asyncio.CancelledError):
            await self.read_until(lambda: False)
        code: grpc.StatusCode = await self._call.code()
        return code

    def disconnect(self) -> None:
        self._call.cancel()

    def _take(self, response: worker_pb2.AttachResponse) -> None:
        self.last_ack = response.ack
        self._sent = [request for request in self._sent if request.frame > response.ack]
        if response.HasField("heartbeat"):
            self.heartbeats.append(response.heartbeat)
        if not self.received.accept(response.frame):
            return
        if response.frame:
            self.frames.append(response)
        for slot, token in zip(response.slots, response.token_ids, strict=True):
            assert slot not in self.ends, "a token came after its sequence's end"
            self.tokens[slot].append(token)
        for end in response.ends:
            assert end.slot not in self.ends, "a second end"
            self.ends[end.slot] = end


class Proxy:
    """A TCP proxy whose connections can be cut. Use as an asynchronous context."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        #: What the target sends is thrown away: on its way when the connection is cut.
        self.swallows = False
        self._target_port = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._near: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._near.add(writer)
        self._writers |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                if not (self.swallows and sink in self._near):
                    sink.write(data)
                    await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()
