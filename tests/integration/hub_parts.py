"""A Hugging Face-shaped endpoint on loopback: an API host, and a storage host beside it."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "c" * 40


@dataclass(frozen=True)
class Seen:
    """One request that came."""

    host: str
    method: str
    path: str
    range: str
    authorization: str


@dataclass
class FakeHub:
    """What the endpoint holds and how it behaves. `large` files lie in storage."""

    repo: str
    files: dict[str, bytes]
    large: frozenset[str] = frozenset()
    token: str = ""
    #: Bytes after which a file's next transfer is cut, each used once.
    cuts: dict[str, list[int]] = field(default_factory=dict)
    #: What is sent in place of a file's content.
    corrupted: dict[str, bytes] = field(default_factory=dict)
    #: Statuses that the next requests for a file get.
    failures: dict[str, list[int]] = field(default_factory=dict)
    #: Names in the listing, if not those of the files.
    listing: list[str] | None = None
    #: A former name of the repository, which redirects.
    moved_from: str = ""
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    storage_url: str = ""

    def __enter__(self) -> FakeHub:
        self._servers = [self._serve("hub"), self._serve("storage")]
        self.url, self.storage_url = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def gets(self, name: str) -> list[Seen]:
        """The GETs of a file that delivered bytes."""
        return [s for s in self.seen if s.method == "GET" and s.path.endswith(f"/{name}")]

    def _serve(self, host: str) -> ThreadingHTTPServer:
        hub = self

        class Handler(_Handler):
            def do_GET(self) -> None:
                self.answer(hub, host)

            def do_HEAD(self) -> None:
                self.answer(hub, host)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, hub: FakeHub, host: str) -> None:
        path = unquote(self.path)
        hub.seen.append(
            Seen(
                *(host, self.command, path, self.headers.get("Range", "")),
                self.headers.get("Authorization", ""),
            )
        )
        if host == "storage":
            self.send_file(hub, path.removeprefix("/"), etag='"of-the-storage"')
            return
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.reply(401, b"{}")
        elif path.startswith(f"/api/models/{hub.repo}/revision/"):
            self.send_listing(hub, path.rpartition("/")[2])
        elif hub.moved_from and path.startswith(f"/{hub.moved_from}/"):
            moved = path.replace(f"/{hub.moved_from}/", f"/{hub.repo}/")
            self.reply(307, b"", {"Location": moved})
        elif path.startswith(f"/{hub.repo}/resolve/{COMMIT}/"):
            self.send_resolved(hub, path.removeprefix(f"/{hub.repo}/resolve/{COMMIT}/"))
        else:
            self.reply(404, b"{}")

    def send_listing(self, hub: FakeHub, revision: str) -> None:
        if revision not in ("main", "v1"):
            self.reply(404, b"{}")
            return
        names = hub.listing if hub.listing is not None else list(hub.files)
        answer = {
            "sha": COMMIT,
            "siblings": [{"rfilename": name} for name in names],
            "cardData": {"license": "mit"},
        }
        self.reply(200, json.dumps(answer).encode())

    def send_resolved(self, hub: FakeHub, name: str) -> None:
        content = hub.files.get(name)
        if content is None:
            self.reply(404, b"")
        elif name in hub.large:
            headers = {
                "Location": f"{hub.storage_url}/{name}",
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            }
            self.reply(302, b"moved", headers)
        else:
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self.send_file(hub, name, etag=f'"{blob}"')

    def send_file(self, hub: FakeHub, name: str, *, etag: str) -> None:
        content = hub.corrupted.get(name, hub.files[name])
        if self.command == "GET" and hub.failures.get(name):
            self.reply(hub.failures[name].pop(0), b"")
            return
        start, status = 0, 200
        headers = {"ETag": etag}
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range", etag) == etag:
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = None
        if self.command == "GET" and hub.cuts.get(name):
            cut = hub.cuts[name].pop(0)
        self.reply(status, content[start:], headers, cut=cut)

    def reply(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
