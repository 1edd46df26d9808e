"""The service as a process: its stream, its unary twins, its health, its end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from headrace import status
from headrace.blocks import block_ids, namespace_key, pack_tokens, unpack_tokens
from headrace.errors import DeadlineExceeded, InvalidArgument, NotFound
from headrace.models.files import ModelFiles
from headrace.v1 import tokenizer_pb2 as pb
from headrace.v1 import types_pb2
from services.tokenizer.tokenizer import Tokenizer
from tests.integration.tokenizer_parts import MODEL, Client, client_of, is_gone, until

KEY = namespace_key("test")
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """A real OTLP receiver."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.port = 0

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    server = grpc.server(ThreadPoolExecutor(2))
    receiver = Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield receiver
    server.stop(None)


class Process:
    """`python -m services.tokenizer`."""

    def __init__(self, directory: Path, *flags: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.status = directory / "status"
        self.log = directory / "log"
        command = [sys.executable, "-m", "services.tokenizer", *flags]
        if "--listen" not in flags:
            command += ["--listen", f"127.0.0.1:{self.port}"]
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                command,
                stderr=log,
                env={**os.environ, **environment, status.VARIABLE: str(self.status)},
            )

    async def ready(self) -> None:
        def is_ready() -> bool:
            assert self.popen.poll() is None, self.log.read_text()
            progress = status.read(self.status)
            return progress is not None and progress.phase == status.READY

        await until(is_ready, "the service is ready", 60)

    def children(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.popen.pid).children(recursive=True)]


@pytest.fixture(scope="module")
def service(
    smollm2: ModelFiles, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    process = Process(
        tmp_path_factory.mktemp("tokenizer"),
        "--model",
        MODEL,
        "--max-text-bytes",
        "3000000",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{receiver.port}",
        OTEL_BSP_SCHEDULE_DELAY="100",
    )
    try:
        asyncio.run(process.ready())
        yield process
        children = process.children()
        process.popen.terminate()
        assert process.popen.wait(20) == 0
        assert all(map(is_gone, children))
    finally:
        process.popen.kill()
        process.popen.wait()


@pytest.fixture
async def client(service: Process) -> AsyncIterator[Client]:
    async with client_of(service.port) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(smollm2: ModelFiles) -> Tokenizer:
    return Tokenizer(smollm2)


async def test_many_calls_share_a_stream(client: Client, tokenizer: Tokenizer) -> None:
    texts = [f"Request {i} " + "of water and wheels " * (i % 50) for i in range(500)]
    answers = await asyncio.gather(
        *(client.encode(text, namespace_key=KEY, block_size=16) for text in texts)
    )
    for text, answer in zip(texts, answers, strict=True):
        assert answer.token_ids == tokenizer.backend.encode(text)
        assert answer.block_ids == b"".join(block_ids(answer.token_ids, 16, KEY))
        assert answer.tokenizer_digest == tokenizer.digest


async def test_long_prompts_and_short_ones_share_a_stream(
    client: Client, tokenizer: Tokenizer
) -> None:
    long = "The river's water turns the wheel 24 hours a day. " * 20_000
    assert len(long) == 1_000_000
    tasks = [asyncio.create_task(client.encode(long)) for _ in range(3)]
    short = await asyncio.gather(*(client.encode(f"short {i}") for i in range(100)))
    assert [a.token_ids for a in short] == [
        tokenizer.backend.encode(f"short {i}") for i in range(100)
    ]
    assert not all(task.done() for task in tasks)
    for answer in await asyncio.gather(*tasks):
        assert answer.token_ids == tokenizer.backend.encode(long)


async def test_chats_decode_and_render(client: Client, tokenizer: Tokenizer) -> None:
    chat = pb.ChatTemplateInput(
        messages=[pb.ChatTemplateMessage(role="user", content="Hi")], add_generation_prompt=True
    )
    request = pb.RenderChatRequest(model=MODEL, chat=chat)
    text = (await client.ask(render_chat=request)).render_chat.text
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    encoded = (await client.ask(encode=pb.EncodeRequest(model=MODEL, chat=chat))).encode
    assert encoded.token_ids == tokenizer.backend.encode(text)
    decode = pb.DecodeRequest(model=MODEL, token_ids=encoded.token_ids)
    assert (await client.ask(decode=decode)).decode.text == text

    # The unary twins.
    assert (await client.stub.RenderChat(request)).text == text
    assert await client.stub.Encode(pb.EncodeRequest(model=MODEL, chat=chat)) == encoded
    assert (await client.stub.Decode(decode)).text == text


async def test_the_table_comes_in_pieces(client: Client, tokenizer: Tokenizer) -> None:
    request = pb.GetDetokenizerTableRequest(model=MODEL)
    pieces = [piece.data async for piece in client.stub.GetDetokenizerTable(request)]
    assert max(map(len, pieces)) <= 64 << 10
    table = pb.DetokenizerTable.FromString(b"".join(pieces))
    assert table.kind == pb.DetokenizerTable.KIND_BYTES
    assert table.tokenizer_digest == tokenizer.digest
    assert table.data == b"".join(tokenizer.backend.texts.pieces)
    assert len(table.lengths) == 2 * len(table.special) == 2 * 49152
    assert list(table.eos_token_ids) == [2]


async def test_tokenizers_and_health_are_told(client: Client, tokenizer: Tokenizer) -> None:
    listed = (await client.stub.ListTokenizers(pb.ListTokenizersRequest())).tokenizers
    assert list(listed) == [
        pb.TokenizerInfo(
            model=MODEL,
            tokenizer_digest=tokenizer.digest,
            vocab_size=49152,
            has_chat_template=True,
            truncation_side="right",
            padding_side="right",
            pad_token_id=tokenizer.info(MODEL).pad_id,
            chat_template=tokenizer.info(MODEL).chat_template,
        )
    ]
    health: Any = health_pb2_grpc.HealthStub(client.channel)
    for name in ("", "headrace.v1.TokenizerService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_refusals_reach_the_client(client: Client) -> None:
    with pytest.raises(NotFound, match=MODEL):
        await client.ask(encode=pb.EncodeRequest(model="no", text="x"))
    with pytest.raises(InvalidArgument, match="the limit is 3,000,000") as caught:
        await client.encode("x" * 3_000_001)
    assert caught.value.field == "prompt"
    with pytest.raises(InvalidArgument, match="messages is empty") as caught:
        await client.ask(encode=pb.EncodeRequest(model=MODEL, chat=pb.ChatTemplateInput()))
    assert caught.value.field == "messages"
    with pytest.raises(InvalidArgument, match="holds no work"):
        await client.ask()
    with pytest.raises(InvalidArgument, match="no text, chat or token_ids"):
        await client.ask(encode=pb.EncodeRequest(model=MODEL))
    bad_ids = pb.DecodeRequest(model=MODEL, token_ids=pack_tokens([5, 99999]))
    with pytest.raises(InvalidArgument, match=r"token_ids\[1\] is 99999"):
        await client.ask(decode=bad_ids)
    for unary, request in (
        (client.stub.Encode, pb.EncodeRequest(model=MODEL, text="")),
        (client.stub.Decode, bad_ids),
        (client.stub.RenderChat, pb.RenderChatRequest(model=MODEL)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await unary(request)
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        async for _ in client.stub.GetDetokenizerTable(pb.GetDetokenizerTableRequest(model="no")):
            pass
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND
    text = "a1" * 500_000
    too_much = pb.EncodeRequest(model=MODEL, text=text, namespace_key=KEY, block_size=16)
    with pytest.raises(grpc.aio.AioRpcError, match="use the stream") as failed:
        await client.stub.Encode(too_much)
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert unpack_tokens((await client.encode("still well")).token_ids)


async def test_batches_offsets_tools_and_unchecked_text(
    client: Client, tokenizer: Tokenizer
) -> None:
    texts = [f"sentence {i} about wheels" for i in range(2048)]
    batch = pb.EncodeBatchRequest(model=MODEL, texts=[text.encode() for text in texts])
    answer = (await client.ask(encode_batch=batch)).encode_batch
    expected = [tokenizer.backend.encode(text) for text in texts]
    assert answer.token_ids == b"".join(expected)
    assert unpack_tokens(answer.counts) == [len(ids) // 4 for ids in expected]
    assert answer.tokenizer_digest == tokenizer.digest
    assert await client.stub.EncodeBatch(batch) == answer

    request = pb.EncodeRequest(model=MODEL, text_utf8="Grüße x".encode(), with_offsets=True)
    encoded = (await client.ask(encode=request)).encode
    assert encoded.token_ids == tokenizer.backend.encode("Grüße x")
    assert unpack_tokens(encoded.offsets)[-2:] == [5, 7]
    cut = await client.encode("a b c d e", max_tokens=2, truncate=True)
    assert cut.token_ids == tokenizer.backend.encode("a b")

    message = b'{"role": "user", "content": "Hi", "name": "n"}'
    chat = pb.ChatTemplateInput(
        messages=[pb.ChatTemplateMessage(message_json=message)],
        tools_json=b'[{"type": "function"}]',
        template_args_json=b'{"enable_thinking": false}',
    )
    render = pb.RenderChatRequest(model=MODEL, chat=chat)
    assert "user\nHi" in (await client.ask(render_chat=render)).render_chat.text
    render.chat.tools_json = b"{"
    with pytest.raises(InvalidArgument, match="tools is no JSON"):
        await client.ask(render_chat=render)


async def test_bad_utf8_fails_its_call_and_nothing_else(client: Client, service: Process) -> None:
    others = [asyncio.create_task(client.encode(f"number {i}")) for i in range(50)]
    request = pb.EncodeRequest(model=MODEL, text_utf8=b"abc\xff")
    with pytest.raises(InvalidArgument, match=r"text_utf8 is no UTF-8: .* at byte 3") as caught:
        await client.ask(encode=request)
    assert caught.value.field == "text_utf8"
    batch = pb.EncodeBatchRequest(model=MODEL, texts=[b"a", b"\xff"])
    with pytest.raises(InvalidArgument, match=r"texts\[1\] is no UTF-8"):
        await client.ask(encode_batch=batch)

    # In a field that protobuf checks: Python's own clients can't send it.
    good = pb.TokenizeRequest(
        calls=[pb.TokenizeCall(id=7, encode=pb.EncodeRequest(model=MODEL, text="~~~~"))]
    )
    bad = good.SerializeToString().replace(b"~~~~", b"\xff\xfe\xff\xfe")
    assert isinstance(await _raw_stream(service, bad), grpc.StatusCode)
    # In chunks it is read after the stream's frame.
    call = good.calls[0].SerializeToString().replace(b"~~~~", b"\xff\xfe\xff\xfe")
    chunked = pb.TokenizeRequest(chunks=[types_pb2.Chunk(id=7, data=call, last=True)])
    answer = await _raw_stream(service, chunked.SerializeToString())
    assert isinstance(answer, pb.TokenizeResponse)
    assert "malformed" in answer.results[0].error.message
    assert all(answer.token_ids for answer in await asyncio.gather(*others))
    assert client.calls.connected


async def test_deadlines_and_cancels_are_honoured(client: Client, service: Process) -> None:
    _, *workers = service.children()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        request = pb.EncodeRequest(model=MODEL, text="x")
        with pytest.raises(DeadlineExceeded, match=r"within 0\.050 s"):
            await client.ask(encode=request, timeout_ms=50)
        waiting = asyncio.create_task(client.ask(encode=request))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    assert unpack_tokens((await client.encode("still well")).token_ids)


async def test_spans_are_children_of_the_caller(client: Client, receiver: Receiver) -> None:
    request = pb.EncodeRequest(model=MODEL, text="a b c")
    await client.ask(encode=request, traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01")

    def found() -> list[Any]:
        return [s for s in receiver.spans if s.trace_id.hex() == TRACE_ID]

    await until(lambda: bool(found()), "the span arrives")
    (span,) = found()
    assert span.name == "tokenizer.encode"
    assert span.parent_span_id.hex() == SPAN_ID
    attributes = {a.key: a.value for a in span.attributes}
    assert attributes["model"].string_value == MODEL
    assert attributes["tokens"].int_value == 3
    assert attributes["work_ms"].double_value > 0
    assert attributes["queue_ms"].double_value > 0


async def test_killed_workers_are_not_noticed(client: Client, service: Process) -> None:
    _, *workers = service.children()
    tasks = [asyncio.create_task(client.encode(f"number {i} " * 200)) for i in range(300)]
    await until(lambda: any(task.done() for task in tasks), "some answers")
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert all(answer.token_ids for answer in await asyncio.gather(*tasks))


async def _raw_stream(service: Process, frame: bytes) -> pb.TokenizeResponse | grpc.StatusCode:
    """What one frame on a stream of its own brings: an answer, or the stream's end."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        stream: Any = channel.stream_stream(
            "/headrace.v1.TokenizerService/Tokenize",
            response_deserializer=pb.TokenizeResponse.FromString,
        )()
        try:
            await stream.write(frame)
            answer: pb.TokenizeResponse = await stream.read()
            return answer
        except grpc.aio.AioRpcError as error:
            return error.code()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "no-such-model"], "model 'no-such-model' is not on this machine"),
        (["--model", MODEL, "--model", MODEL], "there is a model named"),
        ([], "--model .* is required"),
        (["--model", MODEL, "--max-tokens", "0"], "--max-tokens must be 1 or more, not 0"),
        (["--model", MODEL, "--listen", "127.0.0.1:{taken}"], "can't listen on 127.0.0.1"),
        (["--model", "bad={bad}"], "does not begin with 'GGUF'"),
    ],
)
def test_what_can_not_start_says_why(flags: list[str], named: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not one")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = {"taken": str(taken.getsockname()[1]), "bad": str(bad)}
        process = Process(tmp_path, *(flag.format(**values) for flag in flags))
        try:
            assert process.popen.wait(60) == 2
        finally:
            process.popen.kill()
            process.popen.wait()
    assert re.search(named, process.log.read_text())
    assert "Traceback" not in process.log.read_text()
