"""A worker without an engine, that speaks the true protocol and misbehaves when told to.

Its token at position p of the generated ones is `script(p)`: by default the letters
a to z over and over, so that a lost or repeated token shows at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from headrace.blocks import TOKEN_LEN, unpack_tokens
from headrace.logprobs import TokenLogprobs, pack
from headrace.rpc.frames import Assembler, FrameLog, FrameReceiver
from headrace.rpc.options import SERVER
from headrace.v1 import types_pb2, worker_pb2, worker_pb2_grpc

EOS = 256


def letters(position: int) -> int:
    return ord("a") + position % 26


def serve(servicer: Any, add: Callable[[Any, Any], None], port: int = 0) -> tuple[Any, int]:
    server = grpc.aio.server(options=SERVER)
    add(servicer, server)
    return server, server.add_insecure_port(f"127.0.0.1:{port}")


@dataclass
class Live:
    submission: Any
    generated: list[int]


@dataclass
class Session:
    log: FrameLog[Any] = field(default_factory=lambda: FrameLog(1 << 20))
    received: FrameReceiver = field(default_factory=FrameReceiver)
    assembler: Assembler = field(default_factory=Assembler)
    scores: list[Any] = field(default_factory=list)
    live: dict[int, Live] = field(default_factory=dict)
    ends: list[Any] = field(default_factory=list)


def scores(position: int, token: int, count: int) -> bytes:
    """The made-up log probabilities of a token."""
    top = [(letter, -float(position) - letter) for letter in range(count)]
    return pack([TokenLogprobs((token, -float(position)), top)])


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """One token per sequence and step, in resumable sessions."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.generation = 1
        self.port = 0
        self.step_s = 0.002
        self.script: Callable[[int], int] = letters
        self.tokens_per_step = 1
        self.fail_with: Any = None
        #: Tokens each sequence may get before it has to wait.
        self.allowance = 1 << 30
        self.silent = False
        #: What is sent, or what comes, gets lost until the connection breaks.
        self.lose_frames = False
        self.deaf = False
        #: Acknowledgements are ignored: everything is repeated after a break.
        self.repeats_all = False
        self.cached_tokens = 0
        #: Records of a prompt that it sends before it says no more.
        self.max_prompt_scores = 1 << 30
        self.sends_scores = True
        self.sessions: dict[str, Session] = {}
        self.submissions: list[Any] = []
        self.cancels: list[int] = []
        self.frames: list[Any] = []
        self.num_connections = 0
        self._cuts = 0
        self._server: Any = None

    @property
    def ref(self) -> Any:
        return types_pb2.WorkerRef(
            worker_id=self.worker_id, generation=self.generation, address=f"127.0.0.1:{self.port}"
        )

    async def start(self) -> None:
        add = worker_pb2_grpc.add_WorkerServiceServicer_to_server
        self._server, self.port = serve(self, add, self.port)
        await self._server.start()

    async def kill(self) -> None:
        """Gone, with all it knew."""
        self._cuts += 1
        self.sessions.clear()
        await self._server.stop(0)

    def cut(self) -> None:
        """Break the connections; the sessions live on."""
        self._cuts += 1

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        cuts = self._cuts
        self.num_connections += 1
        first = await anext(requests)
        resumed = first.open.resume and first.open.session_id in self.sessions
        if not resumed:
            self.sessions[first.open.session_id] = Session()
        session = self.sessions[first.open.session_id]
        self._acknowledge(session, first)
        reader = asyncio.create_task(self._read(requests, session))
        try:
            opened = worker_pb2.AttachOpened(worker=self.ref, resumed=resumed)
            yield worker_pb2.AttachResponse(ack=session.received.last, opened=opened)
            for frame in session.log.unacknowledged():
                yield frame
            last = time.monotonic()
            while self._cuts == cuts:
                await asyncio.sleep(self.step_s)
                if self.silent:
                    continue
                frame = self._step(session)
                if frame is None and time.monotonic() - last > 0.2:
                    frame = worker_pb2.AttachResponse(heartbeat=worker_pb2.Heartbeat())
                if frame is not None and not self.lose_frames:
                    last = time.monotonic()
                    yield frame
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, requests: Any, session: Session) -> None:
        async for frame in requests:
            if self.deaf:
                continue
            self._acknowledge(session, frame)
            if not session.received.accept(frame.frame):
                continue
            self.frames.append(frame)
            for submission in frame.submissions:
                self._submit(session, submission)
            for chunk in frame.chunks:
                if (data := session.assembler.add(chunk)) is not None:
                    self._submit(session, worker_pb2.Submission.FromString(data))
            for slot in frame.cancels:
                self.cancels.append(slot)
                if session.live.pop(slot, None) or session.assembler.discard(slot):
                    session.ends.append(self._end(slot, types_pb2.FINISH_REASON_CANCELLED))

    def _acknowledge(self, session: Session, frame: Any) -> None:
        if not self.repeats_all:
            session.log.acknowledge(frame.ack)

    def _submit(self, session: Session, submission: Any) -> None:
        self.submissions.append(submission)
        generated = [0] * (len(submission.generated_ids) // TOKEN_LEN)
        session.live[submission.slot] = Live(submission, generated)
        sampling = submission.sampling
        if sampling.HasField("prompt_logprobs") and not generated:
            ids = unpack_tokens(submission.prompt_ids)
            data = [
                scores(position, token, sampling.prompt_logprobs)
                for position, token in enumerate(ids[: self.max_prompt_scores])
                if position
            ]
            session.scores += [
                worker_pb2.SequenceLogprobs(slot=submission.slot, prompt=part) for part in data
            ]
        if self.fail_with is not None:
            del session.live[submission.slot]
            end = self._end(submission.slot, types_pb2.FINISH_REASON_ERROR)
            end.error.CopyFrom(self.fail_with)
            session.ends.append(end)

    def _step(self, session: Session) -> Any:
        slots: list[int] = []
        token_ids: list[int] = []
        for _ in range(self.tokens_per_step):
            for slot, live in list(session.live.items()):
                if len(live.generated) >= self.allowance:
                    continue
                token = self.script(len(live.generated))
                sampling = live.submission.sampling
                if sampling.HasField("logprobs") and self.sends_scores:
                    data = scores(len(live.generated), token, sampling.logprobs)
                    session.scores.append(worker_pb2.SequenceLogprobs(slot=slot, tokens=data))
                live.generated.append(token)
                slots.append(slot)
                token_ids.append(token)
                stopped = token == EOS and not sampling.ignore_eos
                stopped = stopped or token in sampling.stop_token_ids
                if stopped or len(live.generated) >= sampling.max_tokens:
                    reason = (
                        types_pb2.FINISH_REASON_STOP if stopped else types_pb2.FINISH_REASON_LENGTH
                    )
                    session.ends.append(self._end(slot, reason))
                    del session.live[slot]
        if not slots and not session.ends and not session.scores:
            return None
        frame = worker_pb2.AttachResponse(
            slots=slots, token_ids=token_ids, ends=session.ends, logprobs=session.scores
        )
        session.ends.clear()
        session.scores.clear()
        frame.ack = session.received.last
        frame.frame = session.log.next_number()
        session.log.keep(frame, frame.ByteSize())
        return frame

    def _end(self, slot: int, reason: Any) -> Any:
        usage = types_pb2.Usage(cached_tokens=self.cached_tokens)
        return worker_pb2.SequenceEnd(slot=slot, finish_reason=reason, usage=usage)
