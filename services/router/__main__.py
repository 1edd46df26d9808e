"""`python -m services.router`."""

from __future__ import annotations

import os
import sys

from headrace import config, service
from headrace.errors import StartupError
from services.router.app import serve
from services.router.config import Config


def main() -> int:
    """Read the configuration and serve. Returns the exit status."""
    try:
        settings = config.load(
            Config,
            service="router",
            argv=sys.argv[1:],
            description="The router: it knows who holds which prefix, and chooses workers.",
        )
    except StartupError as error:
        service.setup_logs("router")
        service.log.error("%s", error)
        return service.EXIT_CONFIG
    instance = settings.advertise or f"{settings.listen}/{os.getpid()}"
    return service.run("router", instance, lambda stop: serve(settings, stop))


if __name__ == "__main__":
    sys.exit(main())
