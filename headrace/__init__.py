"""Headrace: an inference mesh whose data plane is Python.

What outsiders import: the client (`headrace.Client`, `headrace.AsyncClient`),
generated stubs (`headrace.v1`), errors, configuration and the command line; and the
small library that the services share. Nothing here imports `services`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.client import AsyncClient, Client

__version__ = "0.1.0"

__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> object:
    # Not imported before it is asked for: services load `headrace`, and need no client.
    if name in ("AsyncClient", "Client"):
        from headrace import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
