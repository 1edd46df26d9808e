"""Which Redis or Valkey server holds a key, by the URL that a service is given.

    redis://[user:password@]host[:port][/db]                one server
    rediss://…                                              the same over TLS
    unix:///path/to/socket[?db=N]                           a local socket
    redis+sentinel://[user:password@]host[:port][,…]/name[/db]
                                                            the primary that Sentinels name
    redis+cluster://[user:password@]host[:port][,…]         a Redis Cluster
    rediss+sentinel://…  rediss+cluster://…                 these over TLS

The query takes redis-py's connection options, of which TLS needs: `ssl_ca_certs=FILE`,
`ssl_certfile=FILE`, `ssl_keyfile=FILE`, `ssl_check_hostname=false`, `ssl_cert_reqs=none`.
Sentinels are asked without user and password but for `sentinel_username` and
`sentinel_password` in the query.

Whatever the form, a caller gets a plain client of the one server that holds the key
now: transactions, scripts and blocking reads mean the same everywhere. Nothing is
retried here, since a library's retries hide outages and apply transactions twice:
callers loop, and say with `lost` that what they were told may be out of date.

It knows neither keys nor what stands under them.
"""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from headrace.errors import StartupError
from headrace.redis_outage import explain

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: How long a server may take to accept a connection, and to answer.
TIMEOUT_S = 1.0
_DEFAULT_PORT = 6379
_DEFAULT_SENTINEL_PORT = 26379
#: A primary that Sentinel demoted without our noticing is read for this long at most.
_ASK_SENTINEL_S = 1.0
_SCHEME = re.compile(r"(rediss?|unix)(?:\+(sentinel|cluster))?")
_FILE_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_FORMS = "redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"

Address = tuple[str, int]


class Servers:
    """Clients of what a URL names. `of` from one loop's tasks; `aclose` at the end.

    This class serves one server; its subclasses find the right one of several.
    Errors of `of` are redis-py's, as those of its clients.
    """

    def __init__(self, client: Redis | None = None) -> None:
        self._client = client

    async def of(self, key: str) -> Redis:
        """A client of the server that holds `key`: for what follows at once, not to be kept."""
        assert self._client is not None
        return self._client

    def lost(self) -> None:
        """A command failed: find the servers anew before the next."""

    async def aclose(self) -> None:
        """Disconnect."""
        if self._client is not None:
            await self._client.aclose()


class _Found(Servers):
    """Clients of servers that are found by asking others, kept by address."""

    def __init__(self, seeds: list[Address], url: _Url) -> None:
        super().__init__()
        self._url = url
        self._seeds = seeds
        self._clients: dict[Address, Redis] = {}
        self._asking = asyncio.Lock()
        self._is_stale = True

    def lost(self) -> None:
        self._is_stale = True

    async def aclose(self) -> None:
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.aclose()

    def _at(self, address: Address) -> Redis:
        if address not in self._clients:
            self._clients[address] = self._url.client(*address)
        return self._clients[address]

    async def _keep_only(self, addresses: set[Address]) -> None:
        for address in self._clients.keys() - addresses:
            await self._clients.pop(address).aclose()


class _Sentinels(_Found):
    """The primary of the name that Sentinels watch."""

    def __init__(self, seeds: list[Address], url: _Url, name: str) -> None:
        super().__init__(seeds, url)
        self._name = name
        self._primary: Address | None = None
        self._asked_at = 0.0

    async def of(self, key: str) -> Redis:
        async with self._asking:
            if self._is_stale or time.monotonic() - self._asked_at > _ASK_SENTINEL_S:
                await self._ask()
            assert self._primary is not None
            return self._at(self._primary)

    async def _ask(self) -> None:
        from redis.exceptions import ConnectionError, RedisError

        causes: list[str] = []
        for seed in list(self._seeds):
            # redis-py leaves its generic commands untyped.
            sentinel: Any = self._url.sentinel(*seed)
            try:
                answer = await sentinel.execute_command(
                    "SENTINEL GET-MASTER-ADDR-BY-NAME", self._name
                )
            except (RedisError, OSError) as error:
                causes.append(f"{seed[0]}:{seed[1]}: {explain(error)}")
                self._seeds.append(self._seeds.pop(0))
                continue
            finally:
                await sentinel.aclose()
            if answer is None:
                causes.append(f"{seed[0]}:{seed[1]} watches no primary named {self._name!r}")
                self._seeds.append(self._seeds.pop(0))
                continue
            self._primary = (_text(answer[0]), int(answer[1]))
            self._is_stale, self._asked_at = False, time.monotonic()
            await self._keep_only({self._primary})
            return
        if self._primary is None or self._is_stale:
            raise ConnectionError(f"no Sentinel names the primary: {'; '.join(causes)}")
        # Sentinels are away, the primary is not: go on with it.
        self._asked_at = time.monotonic()


class _Cluster(_Found):
    """The node of a Redis Cluster that serves a key's slot."""

    def __init__(self, seeds: list[Address], url: _Url) -> None:
        super().__init__(seeds, url)
        self._ranges: list[tuple[int, int, Address]] = []

    async def of(self, key: str) -> Redis:
        from redis.crc import key_slot
        from redis.exceptions import ConnectionError

        slot = key_slot(key.encode())
        async with self._asking:
            if self._is_stale:
                await self._ask()
            for first, last, address in self._ranges:
                if first <= slot <= last:
                    return self._at(address)
        self.lost()
        raise ConnectionError(f"no node of the cluster serves slot {slot}: is it complete?")

    async def _ask(self) -> None:
        from redis.exceptions import ConnectionError, RedisError

        causes: list[str] = []
        nodes = [address for _, _, address in self._ranges]
        for host, port in dict.fromkeys([*nodes, *self._seeds]):
            # A connection of its own: those of the map may hang at a node that is gone.
            node: Any = self._url.client(host, port)
            try:
                answer = await node.execute_command("CLUSTER SLOTS")
            except (RedisError, OSError) as error:
                causes.append(f"{host}:{port}: {explain(error)}")
                continue
            finally:
                await node.aclose()
            self._ranges = [
                # An empty address is that of the node that was asked.
                (int(first), int(last), (_text(primary[0]) or host, int(primary[1])))
                for first, last, primary, *_ in _slots(answer)
            ]
            self._is_stale = False
            await self._keep_only({address for _, _, address in self._ranges})
            return
        raise ConnectionError(f"no node of the cluster answers: {'; '.join(causes)}")


class _Url:
    """A URL taken apart. Raises StartupError if there is something wrong with it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        scheme = _SCHEME.fullmatch(parts.scheme)
        if scheme is None or (scheme[1] == "unix" and scheme[2]):
            raise self._wrong(url, f"it must begin with {_FORMS}")
        self.url = url
        self.scheme, self.kind = scheme[1], scheme[2] or ""
        self._query = dict(parse_qsl(parts.query))
        self._sentinel_login = self._take_sentinel_login()
        login, _, hosts = parts.netloc.rpartition("@")
        self._login = f"{login}@" if login else ""
        path = [unquote(part) for part in parts.path.split("/") if part]
        self.name = path.pop(0) if self.kind == "sentinel" and path else ""
        self._db = path[0] if self.kind and path else ""
        if self.kind == "sentinel" and not self.name:
            raise self._wrong(url, "the primary's name is missing: …/NAME")
        if self.kind == "cluster" and self._db not in ("", "0"):
            raise self._wrong(url, "a cluster has database 0 only")
        port = _DEFAULT_SENTINEL_PORT if self.kind == "sentinel" else _DEFAULT_PORT
        self.path = unquote(parts.path) if self.scheme == "unix" else ""
        listed = hosts.split(",") if self.kind else [hosts or "localhost"]
        self.hosts = [] if self.path else [self._host(host, port) for host in listed]
        for option in _FILE_OPTIONS:
            if option in self._query and not Path(self._query[option]).is_file():
                raise self._wrong(url, f"{option}: no file {self._query[option]}")

    def client(self, host: str = "", port: int = 0) -> Redis:
        """A client of the server there; of the URL's own, if it names just one."""
        if not host:
            return self._connect(self.url)
        at = f"[{host}]" if ":" in host else host
        query = f"?{urlencode(self._query)}" if self._query else ""
        return self._connect(f"{self.scheme}://{self._login}{at}:{port}/{self._db or 0}{query}")

    def sentinel(self, host: str, port: int) -> Redis:
        """A client of the Sentinel there."""
        at = f"[{host}]" if ":" in host else host
        query = urlencode(self._query | self._sentinel_login)
        return self._connect(f"{self.scheme}://{at}:{port}/0?{query}")

    def _connect(self, url: str) -> Redis:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        options: dict[str, Any] = {
            "socket_timeout": TIMEOUT_S,
            "socket_connect_timeout": TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
            "decode_responses": False,
            "protocol": 2,
        }
        try:
            client = Redis.from_url(url, **options)
            # Connections are made when needed: a wrong option would be found only then.
            pool: Any = client.connection_pool
            pool.make_connection()
        except (ValueError, TypeError) as error:
            raise self._wrong(self.url, str(error)) from error
        return client

    def _take_sentinel_login(self) -> dict[str, str]:
        names = ("username", "password")
        given = {name: self._query.pop(f"sentinel_{name}", "") for name in names}
        return {name: value for name, value in given.items() if value}

    def _host(self, text: str, default_port: int) -> Address:
        host, colon, port = text.rpartition(":")
        if not colon or text.endswith("]"):
            host, port = text, str(default_port)
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise self._wrong(self.url, f"{text!r} is not HOST:PORT")
        return host.strip("[]"), int(port)

    @staticmethod
    def _wrong(url: str, why: str) -> StartupError:
        return StartupError(f"--redis {redact(url)!r}: {why}")


def servers(url: str) -> Servers:
    """What finds the server of a key by `url`. Connects to nothing yet.

    Raises StartupError for a URL that can't be meant.
    """
    parts = _Url(url)
    # Made once for what is wrong with the options.
    client = parts.client(*parts.hosts[0]) if parts.kind else parts.client()
    if parts.kind == "sentinel":
        return _Sentinels(parts.hosts, parts, parts.name)
    if parts.kind == "cluster":
        return _Cluster(parts.hosts, parts)
    return Servers(client)


def addresses(url: str) -> list[Address | str]:
    """Where `url` says that servers or Sentinels are; a str is a socket's path.

    Raises StartupError for a URL that can't be meant.
    """
    parts = _Url(url)
    return [parts.path] if parts.path else list(parts.hosts)


def connect(url: str) -> Redis:
    """A client of the one server at `url`, for tools and tests. Services use `servers`.

    Raises StartupError for a bad URL, and for one of several servers.
    """
    parts = _Url(url)
    if parts.kind:
        raise StartupError(f"--redis {redact(url)!r} names several servers: use one of them")
    return parts.client()


def redact(url: str) -> str:
    """A URL that may be shown: without its passwords."""
    url = re.sub(r"^([^:/?#]+://[^:/?#]*):[^/?#]*@", r"\1:***@", url)
    return re.sub(r"(password=)[^&#]*", r"\1***", url)


def _slots(answer: Any) -> list[Any]:
    return sorted(answer, key=lambda entry: int(entry[0]))


def _text(data: bytes | str | None) -> str:
    return data.decode() if isinstance(data, bytes) else data or ""
