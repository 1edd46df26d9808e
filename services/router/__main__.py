"""`python -m services.router`."""

from __future__ import annotations

import os
import sys

from headrace import service
from services.router.app import serve
from services.router.config import Config

_DESCRIPTION = "The router: it knows who holds which prefix, and chooses workers."


def main() -> int:
    """Read the configuration and serve. Returns the exit status."""
    config = service.read_config("router", Config, _DESCRIPTION)
    instance = config.advertise or f"{config.listen}/{os.getpid()}"
    return service.run("router", instance, lambda stop: serve(config, stop))


if __name__ == "__main__":
    sys.exit(main())
