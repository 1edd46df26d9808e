"""`python -m services.tokenizer`."""

from __future__ import annotations

import os
import sys

from headrace import config, service
from headrace.errors import StartupError
from services.tokenizer.app import serve
from services.tokenizer.config import Config


def main() -> int:
    """Read the configuration and serve. Returns the exit status."""
    try:
        settings = config.load(
            Config,
            service="tokenizer",
            argv=sys.argv[1:],
            description="The tokenizer: chat templates, text to token ids to block ids.",
        )
    except StartupError as error:
        service.setup_logs("tokenizer")
        service.log.error("%s", error)
        return service.EXIT_CONFIG
    instance = f"{settings.listen}/{os.getpid()}"
    return service.run("tokenizer", instance, lambda stop: serve(settings, stop))


if __name__ == "__main__":
    sys.exit(main())
