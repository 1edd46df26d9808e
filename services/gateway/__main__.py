"""`python -m services.gateway`."""

from __future__ import annotations

import sys
from dataclasses import replace

from headrace import service
from headrace.config import load
from headrace.errors import StartupError
from services.gateway.app import serve
from services.gateway.config import GatewayConfig
from services.gateway.ids import new_gateway_id


def main() -> int:
    try:
        config = load(
            GatewayConfig,
            service="gateway",
            argv=sys.argv[1:],
            description="The public edge of Headrace: gRPC and OpenAI-compatible HTTP.",
        )
    except StartupError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return service.EXIT_CONFIG
    config = replace(config, gateway_id=config.gateway_id or new_gateway_id())
    return service.run("gateway", config.gateway_id, lambda stop: serve(config, stop))


if __name__ == "__main__":
    sys.exit(main())
