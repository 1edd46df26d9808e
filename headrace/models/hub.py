"""One model on a Hugging Face-shaped HTTP endpoint: what it has, and its files, verified.

    GET  /api/models/OWNER/NAME/revision/REV   {"sha", "siblings": [{"rfilename"}], …}
    HEAD /OWNER/NAME/resolve/SHA/FILE          X-Linked-Size, X-Linked-ETag, or the plain ones
    GET  the same, redirected or not; Range goes on with what is there

An etag of 64 hex digits is the content's sha256 (large files), one of 40 the
git blob's sha1. The token goes to the endpoint only, never where it redirects.
Standard library: the hub's own client is built with Rust. It knows no cache.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin, urlsplit

from headrace.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ENDPOINT_VARIABLE = "HF_ENDPOINT"
TOKEN_VARIABLE = "HF_TOKEN"
DEFAULT_REVISION = "main"

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"[\w.-][\w./-]{0,127}")
_MAX_REDIRECTS = 8
_MAX_API_LEN = 16 << 20
_BAD_RANGE = 416
_READ_LEN = 256 << 10
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class HubRef:
    """A model on a hub at one revision."""

    repo: str
    revision: str = DEFAULT_REVISION


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a revision is now: its commit, the names of its files, its licence if stated."""

    commit: str
    files: tuple[str, ...]
    licence: str


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file before it is fetched. `etag` has no quotes; it may be empty."""

    name: str
    url: str
    size: int
    etag: str


def parse_ref(text: str) -> HubRef:
    """`OWNER/NAME[@REV]`. Raises StartupError if it is not that."""
    repo, has_revision, revision = text.partition("@")
    revision = revision if has_revision else DEFAULT_REVISION
    if not _REPO.fullmatch(repo) or not _REVISION.fullmatch(revision) or ".." in text:
        raise StartupError(
            f"a hub's model is written hf:OWNER/NAME or hf:OWNER/NAME@REV, not hf:{text}"
        )
    return HubRef(repo, revision)


class Hub:
    """One endpoint. Every method raises StartupError with cause and cure.

    `attempts` in a row without a byte of progress end a download; between them it
    waits `backoff_s`, doubled each time.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | None = None,
        *,
        attempts: int = 5,
        backoff_s: float = 0.5,
    ) -> None:
        endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE, "")
        if not endpoint:
            raise StartupError(
                "no hub is configured: give its address with --endpoint https://HOST "
                f"or {ENDPOINT_VARIABLE}"
            )
        if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
            raise StartupError(f"--endpoint must be http(s)://HOST[:PORT], not {endpoint!r}")
        self.endpoint = endpoint.rstrip("/")
        self._token = token if token is not None else os.environ.get(TOKEN_VARIABLE, "")
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._opener = urllib.request.build_opener(_NoRedirect)

    def snapshot(self, ref: HubRef) -> Snapshot:
        """What `ref` is now. Refuses a listing with a name that would leave its folder."""
        url = f"{self.endpoint}/api/models/{ref.repo}/revision/{quote(ref.revision, safe='')}"
        what = f"{ref.repo} at revision {ref.revision}"
        with self._open("GET", url, what) as response:
            body = response.read(_MAX_API_LEN)
        try:
            answer = json.loads(body)
            commit = str(answer["sha"])
            files = tuple(str(sibling["rfilename"]) for sibling in answer["siblings"])
        except (ValueError, KeyError, TypeError) as error:
            raise StartupError(f"{url} did not answer as a hub does: {error!r}") from error
        for name in files:
            _check_name(name, ref)
        card = answer.get("cardData")
        licence = card.get("license", "") if isinstance(card, dict) else ""
        return Snapshot(commit, files, str(licence))

    def stat(self, ref: HubRef, commit: str, name: str) -> RemoteFile:
        """Size and etag of a file. Follows the endpoint's own moves, not those to storage."""
        url = f"{self.endpoint}/{ref.repo}/resolve/{quote(commit, safe='')}/{quote(name)}"
        with self._open("HEAD", url, f"{ref.repo}: {name}", to_storage=False) as response:
            headers = response.headers
        size = headers.get("X-Linked-Size") or headers.get("Content-Length")
        etag = headers.get("X-Linked-ETag") or headers.get("ETag") or ""
        if size is None or not size.isdigit():
            raise StartupError(f"{url}: the hub does not say how long the file is")
        return RemoteFile(name, url, int(size), etag.removeprefix("W/").strip('"'))

    def download(self, file: RemoteFile, target: Path, report: Callable[[int], None]) -> None:
        """Fetch `file` to `target`, going on with what `target.partial` holds of it.

        The partial file stays when the connection fails for good, and goes when
        its content is wrong. `report` gets the bytes there are.
        """
        partial = target.with_name(f"{target.name}.partial")
        note = target.with_name(f"{target.name}.etag")
        if not note.exists() or note.read_text() != file.etag:
            partial.unlink(missing_ok=True)
            note.write_text(file.etag)
        failures = 0
        while (have := _size(partial)) != file.size or not partial.exists():
            if have > file.size:
                partial.unlink()
                continue
            try:
                self._fetch(file, partial, have, report)
            except (OSError, http.client.HTTPException) as error:
                failures = 1 if _size(partial) > have else failures + 1
                if getattr(error, "code", 0) == _BAD_RANGE:
                    partial.unlink()
                if failures >= self._attempts:
                    raise StartupError(
                        f"{file.name}: the connection to {self.endpoint} failed at byte "
                        f"{_size(partial)} of {file.size} ({_reason(error)}); pull again to go on"
                    ) from error
                time.sleep(self._backoff_s * 2 ** (failures - 1))
        try:
            verify(partial, file)
        except StartupError:
            partial.unlink()
            raise
        finally:
            note.unlink()
        partial.replace(target)

    def _fetch(
        self, file: RemoteFile, partial: Path, have: int, report: Callable[[int], None]
    ) -> None:
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and file.etag:
            headers["If-Range"] = f'"{file.etag}"'
        with self._open("GET", file.url, file.name, headers=headers, retried=True) as response:
            if have and not _continues(response, have):
                have = 0
            with partial.open("ab" if have else "wb") as out:
                while data := response.read(_READ_LEN):
                    out.write(data)
                    have += len(data)
                    if have > file.size:
                        raise StartupError(
                            f"{file.name}: the hub sends more than {file.size} bytes"
                        )
                    report(have)
        if have < file.size:
            raise http.client.IncompleteRead(b"", file.size - have)

    def _open(
        self,
        method: str,
        url: str,
        what: str,
        *,
        headers: dict[str, str] | None = None,
        to_storage: bool = True,
        retried: bool = False,
    ) -> Any:
        """The response, redirects followed (`to_storage`: to other hosts too).

        Connection errors and server errors are raised as they are if `retried`.
        """
        home = urlsplit(self.endpoint).netloc
        for _ in range(_MAX_REDIRECTS):
            sent = {"Accept-Encoding": "identity", "User-Agent": "headrace", **(headers or {})}
            at_home = urlsplit(url).netloc == home
            if at_home and self._token:
                sent["Authorization"] = f"Bearer {self._token}"
            if not at_home:
                # Storage has etags of its own; the content is verified at the end.
                sent.pop("If-Range", None)
            request = urllib.request.Request(url, method=method, headers=sent)
            try:
                return self._opener.open(request, timeout=_TIMEOUT_S)
            except urllib.error.HTTPError as error:
                moved = urljoin(url, error.headers.get("Location", ""))
                if error.code not in (301, 302, 303, 307, 308) or moved == url:
                    error.close()
                    if retried and (error.code >= 500 or error.code == _BAD_RANGE):
                        raise
                    raise self._refusal(error.code, what) from error
                if not to_storage and urlsplit(moved).netloc != urlsplit(url).netloc:
                    return error
                error.close()
                if urlsplit(moved).scheme not in ("http", "https"):
                    raise StartupError(f"{url} redirects to {moved}: refused") from error
                url = moved
            except (OSError, http.client.HTTPException) as error:
                if retried:
                    raise
                raise StartupError(f"can't reach the hub at {url}: {_reason(error)}") from error
        raise StartupError(f"{what}: more than {_MAX_REDIRECTS} redirects")

    def _refusal(self, code: int, what: str) -> StartupError:
        if code in (401, 403):
            cure = (
                f"the token in {TOKEN_VARIABLE} does not open it"
                if self._token
                else f"if it exists, it needs a token: set {TOKEN_VARIABLE}"
            )
            return StartupError(f"{self.endpoint} refuses {what} (HTTP {code}); {cure}")
        if code == 404:
            return StartupError(f"{self.endpoint} has no {what} (HTTP 404)")
        return StartupError(f"{self.endpoint} answers HTTP {code} for {what}")


def verify(path: Path, file: RemoteFile) -> None:
    """Raises StartupError unless `path` has the size and the digest that the hub announced."""
    size = path.stat().st_size
    if size != file.size:
        raise StartupError(f"{file.name} has {size} bytes, the hub announced {file.size}")
    if re.fullmatch(r"[0-9a-f]{64}", file.etag):
        state = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", file.etag):
        state = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        return
    with path.open("rb") as content:
        while data := content.read(_READ_LEN):
            state.update(data)
    if state.hexdigest() != file.etag:
        raise StartupError(
            f"{file.name} has the {state.name} {state.hexdigest()}, the hub announced "
            f"{file.etag}: it was thrown away; pull again"
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to us: tokens must not follow them."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


def _continues(response: Any, have: int) -> bool:
    """Whether the answer is the rest of the file, not the whole of it."""
    content_range = str(response.headers.get("Content-Range", ""))
    return bool(response.status == 206) and content_range.startswith(f"bytes {have}-")


def _check_name(name: str, ref: HubRef) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise StartupError(f"{ref.repo} lists a file {name!r}, which leaves its folder: refused")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: BaseException) -> str:
    cause = getattr(error, "reason", None) or error
    return str(getattr(cause, "strerror", None) or cause) or type(cause).__name__
