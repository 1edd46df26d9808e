"""`python -m services.gateway`."""

from __future__ import annotations

import sys
from dataclasses import replace

from headrace import service
from services.gateway.app import serve
from services.gateway.config import GatewayConfig
from services.gateway.ids import new_gateway_id

_DESCRIPTION = "The public edge of Headrace: gRPC and OpenAI-compatible HTTP."


def main() -> int:
    """Read the configuration and serve. Returns the exit status."""
    config = service.read_config("gateway", GatewayConfig, _DESCRIPTION)
    config = replace(config, gateway_id=config.gateway_id or new_gateway_id())
    return service.run("gateway", config.gateway_id, lambda stop: serve(config, stop))


if __name__ == "__main__":
    sys.exit(main())
