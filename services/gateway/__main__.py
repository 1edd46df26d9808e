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
    if config.processes < 1:
        return service.refuse("gateway", f"--processes must be 1 or more, not {config.processes}")
    if config.processes > 1:
        # Late: a gateway needs none of it.
        from services.gateway.processes import run_several

        return run_several(config, sys.argv[1:])
    config = replace(config, gateway_id=config.gateway_id or new_gateway_id())
    return service.run("gateway", config.gateway_id, lambda stop: serve(config, stop))


if __name__ == "__main__":
    sys.exit(main())
