"""Two gateway processes on one pair of ports: who is served by whom, and what one's end takes."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import psutil
import pytest

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc, types_pb2
from tests.e2e.mesh import Mesh, running_mesh, wait_for

MODEL = "smollm2-135m"
NAMES = ("gateway-0", "gateway-1")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    flags = ("--workers", "1", "--engine", "sim", "--gateway-processes", "2")
    with running_mesh(tmp_path_factory.mktemp("two"), *flags, environment={}) as mesh:
        yield mesh


@pytest.fixture
def both_up(mesh: Mesh) -> dict[str, int]:
    """The pids of both processes, ready."""
    return wait_for("both gateways", lambda: pids(mesh), 60)


def pids(mesh: Mesh) -> dict[str, int] | None:
    found = {
        p["name"]: p["pid"]
        for p in mesh.status()["processes"]
        if p["name"] in NAMES and p["phase"] == "ready"
    }
    return found if len(found) == 2 else None


def served_ports(pid: int, address: str) -> set[int]:
    """The clients' ports of the connections that a process has on `address`."""
    port = int(address.rpartition(":")[2])
    connections = psutil.Process(pid).net_connections("tcp")
    return {c.raddr.port for c in connections if c.raddr and c.laddr.port == port}


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Stream:
    """One long SSE stream, read by hand."""

    def __init__(self, mesh: Mesh) -> None:
        host, _, port = mesh.http.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        self.port: int = self.socket.getsockname()[1]
        body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 8000, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket.sendall((head + body).encode())
        self.last = b""
        if not self.goes_on():
            self.socket.close()
            raise AssertionError(f"no stream began: {self.last!r}")

    def goes_on(self) -> bool:
        """Whether something more comes."""
        try:
            while data := self.socket.recv(1 << 16):
                self.last = data
                if b"data: " in data:
                    return True
        except ConnectionError:
            pass
        return False

    def is_cut(self) -> bool:
        try:
            while self.socket.recv(1 << 20):
                pass
        except ConnectionError:
            pass
        return True


def complete(mesh: Mesh, connection: http.client.HTTPConnection | None = None) -> str:
    """One short completion over HTTP."""
    own = connection or http.client.HTTPConnection(mesh.http, timeout=30)
    try:
        body = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 8, "temperature": 0})
        own.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = own.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        text: str = json.loads(content)["choices"][0]["text"]
        return text
    finally:
        if connection is None:
            own.close()


def test_both_get_connections_and_a_killed_one_cuts_only_its_own(
    mesh: Mesh, both_up: dict[str, int]
) -> None:
    expected = complete(mesh)
    streams: list[Stream] = []
    try:
        # The kernel draws: 40 connections all on one side would be a miracle.
        while len(streams) < 40:
            streams.append(Stream(mesh))
            owners = {name: served_ports(pid, mesh.http) for name, pid in both_up.items()}
            if len(streams) >= 8 and all(owners.values()):
                break
        mine = {name: [s for s in streams if s.port in owners[name]] for name in NAMES}
        assert all(mine.values())
        killed = psutil.Process(both_up["gateway-0"])
        killed.kill()
        # Until the kernel has closed its listener, that still takes its share of connections.
        wait_for("the killed process to end", lambda: has_ended(killed), 10)
        for stream in mine["gateway-0"]:
            assert stream.is_cut()
        for _ in range(10):
            assert complete(mesh) == expected, "the port is still served"
        for stream in mine["gateway-1"]:
            assert stream.goes_on()
        again = wait_for("gateway-0 to be back", lambda: pids(mesh), 60)
        assert again["gateway-0"] != both_up["gateway-0"]
        assert again["gateway-1"] == both_up["gateway-1"]
        for stream in mine["gateway-1"]:
            assert stream.goes_on()
    finally:
        for stream in streams:
            stream.socket.close()
    mesh.wait_idle()


def over_grpc(mesh: Mesh, channel: grpc.Channel) -> Callable[[], str]:
    """Short completions on one channel."""
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    sampling = types_pb2.SamplingParams(max_tokens=8, temperature=0)
    request = pb.GenerateRequest(model=MODEL, prompt="Hello", sampling=sampling)
    return lambda: "".join(r.text for r in stub.Generate(request, timeout=30))


def test_one_that_is_told_to_stop_cuts_nothing(mesh: Mesh, both_up: dict[str, int]) -> None:
    expected = complete(mesh)
    over = threading.Event()
    failures: list[BaseException] = []
    counts = [0] * 6

    def go_on(number: int, ask: Callable[[], str]) -> None:
        try:
            while not over.is_set():
                assert ask() == expected
                counts[number] += 1
        except BaseException as error:  # noqa: BLE001 - the test fails with it
            failures.append(error)

    # Kept for as long as the server lets them.
    kept = [http.client.HTTPConnection(mesh.http, timeout=30) for _ in range(2)]
    channels = [grpc.insecure_channel(mesh.grpc) for _ in range(2)]
    asks = [
        *(lambda: complete(mesh) for _ in range(2)),
        *(partial(complete, mesh, connection) for connection in kept),
        *(over_grpc(mesh, channel) for channel in channels),
    ]
    threads = [threading.Thread(target=go_on, args=item) for item in enumerate(asks)]
    for thread in threads:
        thread.start()
    wait_for("the load", lambda: min(counts) > 5 or failures)
    os.kill(both_up["gateway-1"], signal.SIGTERM)
    wait_for("gateway-1 to be new", lambda: _is_new(mesh, both_up["gateway-1"]) or failures, 60)
    before = list(counts)
    wait_for(
        "more", lambda: all(c > b + 5 for b, c in zip(before, counts, strict=True)) or failures
    )
    over.set()
    for thread in threads:
        thread.join(60)
    for connection in (*kept, *channels):
        connection.close()
    assert not failures


def _is_new(mesh: Mesh, pid: int) -> bool:
    found = pids(mesh)
    return found is not None and found["gateway-1"] != pid
