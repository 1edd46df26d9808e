"""What to say of a Redis that fails, and how long to wait before the next attempt.

It knows no connection and no key: an error goes in, a line for people comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging

#: First and longest wait between attempts.
_WAIT_S = (0.05, 0.5)
#: Different causes that are said in one outage.
_MAX_SAID = 16


class Outage:
    """Follows one user's luck with the Redis `where`: says each cause once, and the end."""

    def __init__(self, log: logging.Logger, where: str) -> None:
        #: What is wrong now, with its cure; empty while all is well.
        self.cause = ""
        self._log = log
        self._where = where
        self._said: set[str] = set()
        self._wait_s = 0.0

    def failed(self, error: BaseException) -> float:
        """Redis failed. Returns how long to wait before the next attempt, in seconds."""
        self.cause = explain(error)
        if self.cause not in self._said and len(self._said) < _MAX_SAID:
            self._said.add(self.cause)
            self._log.warning("Redis at %s: %s; going on without it", self._where, self.cause)
        self._wait_s = min(max(2 * self._wait_s, _WAIT_S[0]), _WAIT_S[1])
        return self._wait_s

    def over(self) -> None:
        """Redis did what it was asked."""
        if self.cause:
            self._log.info("Redis at %s answers again", self._where)
            self._said.clear()
            self.cause = ""
        self._wait_s = 0.0


def explain(error: BaseException) -> str:
    """What went wrong with Redis and what helps, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    for sign, cure in _CURES:
        if sign in text or sign == type(error).__name__:
            return f"{text} ({cure})"
    return text


_LOGIN = "user or password in the Redis URL is wrong"
_NO_LOGIN = "it wants a user and password: put them in the Redis URL"
_NO_REDIS = "what answers there is no Redis, or speaks TLS: look at the Redis URL"
_NO_RIGHT = "the user lacks a right: docs/running.md has the ACL rule"
_REPLICA = "a replica takes no writes: name the primary, or its Sentinels"
_FULL = "it is full: raise its maxmemory, or give Headrace a server of its own"
_IN_CLUSTER = "it is a node of a cluster: use redis+cluster://"

#: A word of the server's answer, or an error's class, and what helps. The first counts.
_CURES = (
    ("WRONGPASS", _LOGIN),
    ("invalid username-password", _LOGIN),
    ("invalid password", _LOGIN),
    ("NOAUTH", _NO_LOGIN),
    ("Authentication required", _NO_LOGIN),
    ("NOPERM", _NO_RIGHT),
    ("NoPermissionError", _NO_RIGHT),
    ("ReadOnlyError", _REPLICA),
    ("read only replica", _REPLICA),
    ("OutOfMemoryError", _FULL),
    ("OOM command", _FULL),
    ("MISCONF", "it can't save its data: mend its disk, or switch saving off"),
    ("MovedError", _IN_CLUSTER),
    ("MOVED", _IN_CLUSTER),
    ("cluster support disabled", "it is no cluster: use redis://"),
    ("InvalidResponse", _NO_REDIS),
    ("Protocol error", _NO_REDIS),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not trusted: ssl_ca_certs in the URL"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS: use redis://"),
    ("DB index is out of range", "it has fewer databases: name another in the Redis URL"),
)
