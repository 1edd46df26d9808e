"""What the router is started with."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.config import option
from services.router.policies import POLICIES
from services.router.waiting import MAX_WAITING


@dataclass(frozen=True)
class Config:
    """Each field is a flag, a variable HEADRACE_ROUTER_… and a key of [router]."""

    listen: str = option("127.0.0.1:50053", help="address to serve on", metavar="HOST:PORT")
    advertise: str | None = option(
        None, help="address that others reach it at, if not the one it listens on",
        metavar="HOST:PORT",
    )  # fmt: skip
    redis: str = option(
        "redis://127.0.0.1:6379/0", help="where workers publish what they own", metavar="URL"
    )
    peers: tuple[str, ...] = option(
        (), help="the other routers of the same workers, or all of them (repeat, or separate "
        "by commas)", metavar="HOST:PORT",
    )  # fmt: skip
    policy: str = option("kv", help="how to choose a worker", choices=tuple(POLICIES))
    slo_ttft_ms: tuple[str, ...] = option(
        (), help="wanted time to the first token, of all models or of one (repeat, or separate "
        "by commas)", metavar="[MODEL=]MS",
    )  # fmt: skip
    slo_itl_ms: tuple[str, ...] = option(
        (), help="wanted time between tokens, likewise", metavar="[MODEL=]MS"
    )
    max_waiting: int = option(
        MAX_WAITING, help="requests that may wait while every worker is busy", metavar="NUMBER"
    )
