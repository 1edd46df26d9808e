"""Free ports for inner services, and a clear word when a port for clients is taken or a
Redis is not there."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from headrace.config import split_address
from headrace.errors import StartupError
from headrace.redis_servers import addresses, redact

LOOPBACK = "127.0.0.1"
_LOWEST = 20000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_MAX_TRIES = 2000
_REDIS_TIMEOUT_S = 3.0


def free_addresses(count: int, taken: frozenset[int] = frozenset()) -> list[str]:
    """Loopback addresses that nothing listens on now. Raises StartupError if there are none.

    Below the ports that the kernel gives to outgoing connections: a service keeps
    its port while it is restarted, and meanwhile a connection of another, even
    one to that very port, could come to own it.
    """
    highest = _first_ephemeral() - 1
    found: dict[int, None] = {}
    for _ in range(_MAX_TRIES):
        if len(found) == count:
            return [f"{LOOPBACK}:{port}" for port in found]
        port = random.randint(_LOWEST, highest)
        if port not in found and port not in taken and _bind_error(LOOPBACK, port) is None:
            found[port] = None
    raise StartupError(f"found no {count} free ports between {_LOWEST} and {highest}")


def check_free(address: str, flag: str) -> str:
    """`address`, with a free port in place of 0. Raises StartupError naming `flag`."""
    host, port = split_address(address, what=flag)
    if port == 0:
        # Of the chosen host: nothing else would listen on all its ports at once.
        port = int(free_addresses(1)[0].rpartition(":")[2])
    error = _bind_error(host, port)
    if error is None:
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    raise StartupError(
        f"{flag} {address}: {_explain(error, port)}; choose another with {flag} HOST:PORT"
    )


def check_redis(url: str) -> None:
    """Raises StartupError if `url` is none of a Redis or nothing answers there."""
    error: OSError | None = None
    for address in addresses(url):
        try:
            if isinstance(address, str):
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(address)
            else:
                socket.create_connection(address, timeout=_REDIS_TIMEOUT_S).close()
        except OSError as failure:
            error = failure
        else:
            return  # Of several servers one is enough to find the others.
    raise StartupError(f"--redis {redact(url)}: can't connect ({error})") from error


def _bind_error(host: str, port: int) -> OSError | None:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: the remains of closed connections are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        return error
    return None


def _explain(error: OSError, port: int) -> str:
    if isinstance(error, socket.gaierror):
        return f"the host is unknown ({error.strerror})"
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; stop what listens there"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    return str(error.strerror)


def _first_ephemeral() -> int:
    try:
        first = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768
    return first if first > _LOWEST + _MAX_TRIES else 32768
