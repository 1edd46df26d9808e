"""`python -m services.tokenizer`."""

from __future__ import annotations

import os
import sys

from headrace import service
from services.tokenizer.app import serve
from services.tokenizer.config import Config

_DESCRIPTION = "The tokenizer: chat templates, text to token ids to block ids."


def main() -> int:
    """Read the configuration and serve. Returns the exit status."""
    config = service.read_config("tokenizer", Config, _DESCRIPTION)
    instance = f"{config.listen}/{os.getpid()}"
    return service.run("tokenizer", instance, lambda stop: serve(config, stop))


if __name__ == "__main__":
    sys.exit(main())
