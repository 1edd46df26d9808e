"""Ids that the gateway gives out. They carry no meaning."""

from __future__ import annotations

import secrets


def new_request_id() -> str:
    """A new request's id, the same in responses, logs, traces and on workers."""
    return f"req-{secrets.token_hex(12)}"


def new_gateway_id() -> str:
    """The id of a gateway that was given none."""
    return f"gateway-{secrets.token_hex(4)}"


def new_session_id() -> str:
    """The id of a session with a worker; nobody can guess it."""
    return secrets.token_hex(16)
