"""The gRPC server of the edge: a real socket, a client that says what it likes."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import ssl
import subprocess
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hpack import Decoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import InvalidArgument, ResourceExhausted, StartupError
from services.gateway.h2 import connection, server, wire
from services.gateway.h2.server import EdgeServer
from tests.unit.gateway.conftest import eventually
from tests.unit.gateway.raw_http2 import ECHO, RawClient


class Echo:
    """Says what it hears, in every kind of method."""

    def __init__(self) -> None:
        self.num_cancelled = 0
        self.entered = asyncio.Event()

    async def say(self, request: bytes, context: Any) -> bytes:
        if request == b"fail":
            raise ZeroDivisionError
        if request == b"refuse":
            raise InvalidArgument("no", field="word")
        context.set_trailing_metadata((("seen-bin", request[:20]),))
        return request

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield str(number).encode()

    async def hang(self, request: bytes, context: Any) -> bytes:
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.num_cancelled += 1
        return b""

    async def chat(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request * 2

    async def sum(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return str(sum([len(request) async for request in requests])).encode()

    def handlers(self) -> dict[str, Any]:
        return {
            "Say": grpc.unary_unary_rpc_method_handler(self.say),
            "Hang": grpc.unary_unary_rpc_method_handler(self.hang),
            "Count": grpc.unary_stream_rpc_method_handler(self.count),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat),
            "Sum": grpc.stream_unary_rpc_method_handler(self.sum),
        }


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def edge(echo: Echo) -> AsyncIterator[EdgeServer]:
    edge = EdgeServer("127.0.0.1:0", ["test.Echo"])
    edge.grpc_server.add_registered_method_handlers("test.Echo", echo.handlers())
    await edge.start()
    yield edge
    await edge.stop()
    assert (edge.num_connections, edge.num_calls, edge.held_len) == (0, 0, 0)


@pytest.fixture
async def raw(edge: EdgeServer) -> AsyncIterator[RawClient]:
    client = await RawClient.connect(edge.port)
    yield client
    await client.close()


@pytest.fixture
async def channel(edge: EdgeServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}") as channel:
        yield channel


async def test_every_kind_of_method(channel: Any) -> None:
    assert await channel.unary_unary(ECHO)(b"hello") == b"hello"
    assert [m async for m in channel.unary_stream("/test.Echo/Count")(b"3")] == [b"0", b"1", b"2"]
    words = [b"a" * length for length in (0, 1, 70_000, 3_000_000)]
    assert [m async for m in channel.stream_stream("/test.Echo/Chat")(iter(words[:3]))] == [
        word * 2 for word in words[:3]
    ]
    assert await channel.stream_unary("/test.Echo/Sum")(iter(words)) == b"3070001"


async def test_a_large_answer_in_pieces(channel: Any) -> None:
    data = bytes(range(256)) * 12_000
    assert await channel.unary_unary(ECHO)(data) == data


async def test_many_calls_at_once_on_one_connection(edge: EdgeServer, channel: Any) -> None:
    calls = [channel.unary_unary(ECHO)(str(number).encode() * 5000) for number in range(300)]
    answers = await asyncio.gather(*calls)
    assert answers == [str(number).encode() * 5000 for number in range(300)]
    assert edge.num_connections == 1


async def test_metadata_both_ways(channel: Any) -> None:
    call = channel.unary_unary(ECHO)(b"\0\xff", metadata=(("data-bin", b"\1\2"), ("text", "x")))
    await call
    assert dict(await call.trailing_metadata())["seen-bin"] == b"\0\xff"


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests(channel: Any, algorithm: Any) -> None:
    assert await channel.unary_unary(ECHO)(b"x" * 9999, compression=algorithm) == b"x" * 9999


async def test_errors_of_handlers(channel: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(ECHO)(b"refuse")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(ECHO)(b"fail")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "incident" in caught.value.details()
    assert "ZeroDivisionError" not in caught.value.details()
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test.Echo/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_deadlines_and_cancels_reach_the_handler(
    edge: EdgeServer, channel: Any, echo: Echo
) -> None:
    hang = channel.unary_unary("/test.Echo/Hang")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hang(b"", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: echo.num_cancelled == 1, "the deadline cancels")
    echo.entered.clear()
    call = hang(b"")
    await echo.entered.wait()
    call.cancel()
    await eventually(lambda: echo.num_cancelled == 2, "the client cancels")
    echo.entered.clear()
    call = hang(b"")
    await echo.entered.wait()
    await channel.close()
    await eventually(lambda: echo.num_cancelled == 3, "its connection is gone")
    await eventually(lambda: edge.num_calls == 0)


async def test_a_deadline_that_the_client_does_not_watch(raw: RawClient, echo: Echo) -> None:
    raw.send(raw.headers(1, p_path="/test.Echo/Hang", grpc_timeout="100m"), raw.message(1, b""))
    assert (await raw.status(1))["grpc-status"] == "4"
    await eventually(lambda: echo.num_cancelled == 1)


async def test_two_servers_never_share_a_port_by_accident(edge: EdgeServer) -> None:
    with pytest.raises(StartupError, match="the port is in use"):
        await EdgeServer(f"127.0.0.1:{edge.port}", []).start()


async def test_several_share_a_port_if_told_to() -> None:
    first = EdgeServer("127.0.0.1:0", [], reuse_port=True)
    second = EdgeServer(f"127.0.0.1:{await first.start()}", [], reuse_port=True)
    assert await second.start() == first.port
    await first.stop()
    await second.stop()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return certificate, key


async def test_tls(certificate: tuple[Path, Path], echo: Echo) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    edge = EdgeServer("localhost:0", [], tls=context)
    edge.grpc_server.add_registered_method_handlers("test.Echo", echo.handlers())
    port = await edge.start()
    roots = grpc.ssl_channel_credentials(certificate[0].read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{port}", roots) as channel:
        assert await channel.unary_unary(ECHO)(b"x" * 100_000) == b"x" * 100_000
    await edge.stop()


async def test_an_old_connection_is_told_to_go_and_its_calls_end(
    monkeypatch: pytest.MonkeyPatch, echo: Echo
) -> None:
    monkeypatch.setattr(connection, "TICK_S", 0.05)
    edge = EdgeServer("127.0.0.1:0", [], max_age_s=0.01, age_grace_s=20)
    edge.grpc_server.add_registered_method_handlers("test.Echo", echo.handlers())
    await edge.start()
    client = await RawClient.connect(edge.port)
    client.send(client.headers(1, p_path="/test.Echo/Chat"), client.message(1, b"a", last=False))
    first = await client.until(wire.GOAWAY)
    assert int.from_bytes(first.payload[:4], "big") == wire.MAX_WINDOW
    ping = await client.until(wire.PING)
    # A call that crossed the warning is served; one after the last word is not.
    client.send(client.headers(3), client.message(3, b"crossing"))
    assert (await client.status(3))["grpc-status"] == "0"
    client.send(wire.frame(wire.PING, wire.ACK, 0, ping.payload))
    last = await client.until(wire.GOAWAY)
    assert int.from_bytes(last.payload[:4], "big") == 3
    client.send(client.headers(5), client.message(1, b"b"))
    assert (await client.until(wire.RST_STREAM)).stream_id == 5
    assert (await client.status(1))["grpc-status"] == "0"
    while await client.frame() is not None:
        pass
    await client.close()
    await edge.stop()


async def test_a_channel_survives_its_connections(
    monkeypatch: pytest.MonkeyPatch, echo: Echo
) -> None:
    monkeypatch.setattr(connection, "TICK_S", 0.02)
    edge = EdgeServer("127.0.0.1:0", [], max_age_s=0.01, age_grace_s=20)
    edge.grpc_server.add_registered_method_handlers("test.Echo", echo.handlers())
    seen: set[int] = set()
    await edge.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}") as channel:
        for number in range(200):
            assert await channel.unary_unary(ECHO)(b"%d" % number) == b"%d" % number
            seen |= {id(c) for c in edge._connections}
    assert len(seen) > 1
    await edge.stop()


async def test_a_silent_client_with_a_call_is_found(
    monkeypatch: pytest.MonkeyPatch, edge: EdgeServer, echo: Echo
) -> None:
    monkeypatch.setattr(connection, "TICK_S", 0.1)
    client = await RawClient.connect(edge.port)
    client.send(client.headers(1, p_path="/test.Echo/Hang"), client.message(1, b""))
    await eventually(lambda: echo.num_cancelled == 1, "the connection is given up")
    await client.close()


@pytest.mark.parametrize("said", [b"", b"PRI * HT"])
async def test_a_client_that_never_greets(
    monkeypatch: pytest.MonkeyPatch, edge: EdgeServer, said: bytes
) -> None:
    monkeypatch.setattr(connection, "TICK_S", 0.1)
    client = await RawClient.connect(edge.port, greet=False)
    client.send(said)
    while await client.frame() is not None:
        pass
    await client.close()


async def test_http_1_is_told_what_this_is(edge: EdgeServer) -> None:
    client = await RawClient.connect(edge.port, greet=False)
    client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert "HTTP/2" in (await client.goaway())[1]
    await client.close()


BAD_FRAMES = {
    "too long": b"\xff\xff\xff" + bytes(6),
    "data on no stream": wire.frame(wire.DATA, 0, 7, b"x"),
    "data on stream 0": wire.frame(wire.DATA, 0, 0, b"x"),
    "all padding": wire.frame(wire.HEADERS, wire.PADDED | wire.END_HEADERS, 1, b"\x09x"),
    "headers on an even stream": wire.frame(wire.HEADERS, wire.END_HEADERS, 2),
    "rubbish for headers": wire.frame(wire.HEADERS, wire.END_HEADERS, 1, b"\xff" * 40),
    "short priority in headers": wire.frame(
        wire.HEADERS, wire.END_HEADERS | wire.WITH_PRIORITY, 1, b"ab"
    ),
    "interrupted headers": wire.frame(wire.HEADERS, 0, 1, b"\x82") + wire.frame(wire.PING, 0, 0),
    "a continuation of nothing": wire.frame(wire.CONTINUATION, 0, 1, b"\x82"),
    "endless headers": wire.frame(wire.HEADERS, 0, 1, b"\x82")
    + wire.frame(wire.CONTINUATION, 0, 1, bytes(16384)) * 3,
    "a push": wire.frame(wire.PUSH_PROMISE, 0, 1, b"abcd"),
    "a short ping": wire.frame(wire.PING, 0, 0, b"abc"),
    "odd settings": wire.frame(wire.SETTINGS, 0, 0, b"abc"),
    "a huge window": wire.frame(wire.SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff"),
    "settings of a stream": wire.frame(wire.SETTINGS, 0, 1),
    "a window of nothing": wire.window_update(0, 0),
    "too much window": wire.window_update(0, wire.MAX_WINDOW),
    "a window of no stream": wire.window_update(9, 1),
    "a reset of no stream": wire.reset(9, 1),
    "a short reset": wire.frame(wire.RST_STREAM, 0, 1, b"a"),
    "a short priority": wire.frame(wire.PRIORITY, 0, 1, b"a"),
    "a flood": wire.frame(wire.PING, 0, 0, bytes(8)) * 20_010,
}


@pytest.mark.parametrize("data", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
async def test_who_breaks_the_protocol_loses_the_connection(raw: RawClient, data: bytes) -> None:
    raw.send(data)
    code, text = await raw.goaway()
    assert code != wire.NO_ERROR
    assert text


async def test_a_stream_is_not_opened_twice(raw: RawClient) -> None:
    raw.send(raw.headers(3), raw.message(3, b"x"))
    await raw.status(3)
    raw.send(raw.headers(1))
    assert (await raw.goaway())[0] == wire.STREAM_CLOSED


@pytest.mark.parametrize(
    "changes",
    [{"p_path": None}, {"p_method": None}, {"connection": "close"}, {"Upper": "x"}],
    ids=str,
)
async def test_malformed_headers_reset_their_stream(raw: RawClient, changes: Any) -> None:
    raw.send(raw.headers(1, **changes))
    assert (await raw.until(wire.RST_STREAM)).stream_id == 1
    raw.send(raw.headers(3), raw.message(3, b"x"))
    assert (await raw.status(3))["grpc-status"] == "0"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"p_method": "GET"}, {":status": "405"}),
        ({"content_type": "text/html"}, {":status": "415"}),
        ({"content_type": None}, {":status": "415"}),
        ({"p_path": "/a/b"}, {"grpc-status": "12"}),
        ({"grpc_encoding": "zstd"}, {"grpc-status": "12"}),
        ({"grpc_timeout": "soon"}, {"grpc-status": "3"}),
        ({"grpc_timeout": "123456789S"}, {"grpc-status": "3"}),
        ({"data_bin": "?"}, {"grpc-status": "3"}),
    ],
    ids=str,
)
async def test_calls_that_are_refused(raw: RawClient, changes: Any, status: Any) -> None:
    raw.send(raw.headers(1, wire.END_HEADERS | wire.END_STREAM, **changes))
    assert status.items() <= (await raw.status(1)).items()


async def test_bad_messages_end_their_call_only(raw: RawClient) -> None:
    raw.send(raw.headers(1, wire.END_HEADERS | wire.END_STREAM))
    assert (await raw.status(1))["grpc-status"] == "3", "no request at all"
    raw.send(raw.headers(3), wire.frame(wire.DATA, 0, 3, b"\0\xff\xff\xff\xff"))
    assert (await raw.status(3))["grpc-status"] == "8", "four gigabytes"
    raw.send(raw.headers(5), raw.message(5, b"plain", flag=1))
    assert (await raw.status(5))["grpc-status"] == "3", "compressed, but by what?"
    raw.send(raw.headers(7, grpc_encoding="gzip"), raw.message(7, b"plain", flag=1))
    assert (await raw.status(7))["grpc-status"] == "3", "not gzip"
    bomb = gzip.compress(bytes(80 << 20))
    raw.send(raw.headers(9, grpc_encoding="gzip"), raw.message(9, bomb, flag=1))
    assert (await raw.status(9))["grpc-status"] == "8", "a bomb"
    raw.send(raw.headers(11), raw.message(11, b"fine"))
    assert (await raw.status(11))["grpc-status"] == "0"


async def test_more_than_the_window_lets_through(raw: RawClient) -> None:
    # More is granted as messages are read, and here only the first is.
    raw.send(raw.headers(1, p_path="/test.Echo/Hang"), raw.message(1, b"", last=False) * 2)
    raw.send(raw.message(1, bytes(1_040_000), last=False))
    raw.send(wire.frame(wire.DATA, 0, 1, bytes(16384)) * 2)
    assert (await raw.until(wire.RST_STREAM)).payload == wire.FLOW_CONTROL_ERROR.to_bytes(4, "big")


async def test_a_client_s_window_holds(raw: RawClient) -> None:
    raw.send(wire.settings({wire.INITIAL_WINDOW_SIZE_ID: 100}))
    raw.send(raw.headers(1), raw.message(1, b"x" * 1000))
    got = b""
    while len(got) < 100:
        got += (await raw.until(wire.DATA)).payload
    assert len(got) == 100
    raw.send(wire.frame(wire.PING, 0, 0, b"12345678"))
    assert (await raw.frame()).kind == wire.PING, "nothing more came"  # type: ignore[union-attr]
    raw.send(wire.settings({wire.INITIAL_WINDOW_SIZE_ID: 500}))
    while len(got) < 500:
        got += (await raw.until(wire.DATA)).payload
    raw.send(wire.window_update(1, 10_000))
    assert (await raw.status(1))["grpc-status"] == "0"


async def test_an_end_that_is_not_taken_is_given_up(
    monkeypatch: pytest.MonkeyPatch, edge: EdgeServer
) -> None:
    monkeypatch.setattr(connection, "TICK_S", 0.05)
    client = await RawClient.connect(edge.port)
    client.send(wire.settings({wire.INITIAL_WINDOW_SIZE_ID: 0}))
    client.send(client.headers(1), client.message(1, b"x" * 1000))
    assert (await client.until(wire.RST_STREAM)).stream_id == 1
    await client.close()


async def test_no_more_calls_than_the_server_takes(
    monkeypatch: pytest.MonkeyPatch, edge: EdgeServer, raw: RawClient
) -> None:
    monkeypatch.setattr(server, "MAX_CALLS", 2)
    for stream_id in (1, 3, 5):
        raw.send(raw.headers(stream_id, p_path="/test.Echo/Hang"), raw.message(stream_id, b""))
        if stream_id < 5:
            await eventually(lambda: edge.num_calls == (1 + stream_id) // 2)  # noqa: B023
    assert (await raw.status(5))["grpc-status"] == "8"
    raw.send(wire.reset(1, wire.CANCEL), wire.reset(3, wire.CANCEL))
    await eventually(lambda: edge.num_calls == 0)


async def test_no_more_half_messages_than_the_server_holds(
    monkeypatch: pytest.MonkeyPatch, edge: EdgeServer, raw: RawClient
) -> None:
    monkeypatch.setattr(server, "MAX_HELD_LEN", 1000)
    half = b"\0\0\0\x10\0" + bytes(700)
    raw.send(raw.headers(1), wire.frame(wire.DATA, 0, 1, half))
    await eventually(lambda: edge.held_len == len(half))
    raw.send(raw.headers(3), wire.frame(wire.DATA, 0, 3, half))
    assert (await raw.status(3))["grpc-status"] == "8"
    raw.send(wire.reset(1, wire.CANCEL))
    await eventually(lambda: edge.held_len == 0)


async def test_no_more_connections_than_the_server_takes() -> None:
    edge = EdgeServer("127.0.0.1:0", [], max_connections=1)
    await edge.start()
    first = await RawClient.connect(edge.port)
    await first.until(wire.SETTINGS)
    second = await RawClient.connect(edge.port)
    while await second.frame() is not None:
        pass
    await second.close()
    await first.close()
    await edge.stop()


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 11),
            st.integers(0, 255),
            st.sampled_from([0, 1, 1, 3, 5, 2, 1 << 30]),
            st.binary(max_size=60),
        ),
        max_size=25,
    )
)
def test_random_frames_harm_nobody(frames: list[tuple[int, int, int, bytes]]) -> None:
    async def run() -> None:
        echo = Echo()
        edge = EdgeServer("127.0.0.1:0", [])
        edge.grpc_server.add_registered_method_handlers("test.Echo", echo.handlers())
        await edge.start()
        client = await RawClient.connect(edge.port)
        client.send(client.headers(1, p_path="/test.Echo/Chat"))
        client.send(*(wire.frame(*one) for one in frames))
        await client.close()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}") as channel:
            assert await channel.unary_unary(ECHO)(b"well?") == b"well?"
        await edge.stop()
        assert (edge.num_connections, edge.num_calls, edge.held_len) == (0, 0, 0)

    asyncio.run(run())


@given(st.lists(st.tuples(st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True), st.text(
    st.characters(min_codepoint=33, max_codepoint=126), max_size=300))))  # fmt: skip
def test_header_blocks_are_read_as_written(headers: list[tuple[str, str]]) -> None:
    decoded = Decoder(1 << 20).decode(wire.header_block(headers))
    assert [(str(name), str(value)) for name, value in decoded] == headers


def test_messages_in_a_status_are_ascii() -> None:
    fields = dict(Decoder().decode(wire.status_block(3, "50 % Müll\n", [])))
    assert fields["grpc-message"] == "50 %25 M%C3%BCll%0A"


def test_compressed_data_is_bounded_and_whole() -> None:
    packed = gzip.compress(b"a" * 1000)
    assert wire.decompress(packed, "gzip", 1000) == b"a" * 1000
    with pytest.raises(ResourceExhausted):
        wire.decompress(packed, "gzip", 999)
    with pytest.raises(InvalidArgument):
        wire.decompress(packed[:-9], "gzip", 1000)
    assert wire.decompress(zlib.compress(b"x"), "deflate", 10) == b"x"
